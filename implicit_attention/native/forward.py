"""The compiled forward pass of one diagonal block; `README.md` beside this file derives it.

Rows are settled four at a time. What the query map makes of their values and of the attention before them is computed
once, by head; outputs are combinations of those, so a sweep needs no product with Omega_Q.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from implicit_attention.native.machine import (
    bits,
    call,
    compiled,
    exact,
    exp_of,
    fast,
    float32_at,
    float64_at,
    kernel,
    number_of,
    pointer_like,
    shifted,
    tile4,
    tile8,
)
from implicit_attention.native.roots import solve

R = 4  # rows that are settled together
MOST_SWEEPS = 32
PATIENCE = 8  # sweeps after which rows that still settle slowly have their own equations solved


# What a call is told, by position in its array of integers: addresses, strides, sizes.
(
    KEY, VALUE, WEIGHT, CONSTANT, ADDED, TURN, Y, QUERY, INVERSE, LSE, RESIDUAL, SIZE, STRICT, GIVEN, SCRATCH,
    BEFORE_Y, BEFORE_LSE, NUMBERS, SWEEPS, STATUS, BARRIER, THREAD,
    KEY_B, KEY_H, KEY_N, VALUE_B, VALUE_G, VALUE_N, TURN_B, TURN_HALF, STRICT_B, STRICT_H, SLOT,
    TEAM, BATCH, HEADS, GROUPS, LENGTH, DIM, PADDED, WIDTH, VECTOR, FIRST, STOP, BLOCK, COUNT,
) = range(46)  # fmt: skip
SCALE, EPS, RTOL, ATOL, ZERO, ONE, INFINITY, INVERSE_DIM, NEAR, SAME_ROOT, SLOW = range(11)


class Tensors(NamedTuple):
    """Pointers to tensors, and to one thread's or team's scratch."""

    key: Any
    value: Any
    weight: Any  # [G, H, d, padded]
    constant: Any  # [G d]
    added: Any  # [B, N, G d]
    turn: Any  # [2, 1 or B, N, d / 2]
    y: Any  # [B, N, H, d]
    query: Any  # [B, N, G, d]
    inverse: Any  # [B, N, G]
    lse: Any  # [B, H, N]
    residual: Any  # [B, N]
    size: Any  # [B, N]
    strict: Any  # [1 or B, 1 or H, n, n]
    given: Any  # [B, H, N]
    numbers: Any
    before_y: Any  # [B, n, H, d]
    before_lse: Any  # [B, H, n]
    # Scratch
    values: Any  # [G, n + R, padded]
    columns: Any  # [G, d, width]
    inputs: Any  # [H, 2 R, d]
    made: Any  # [G, 2 R, H, padded]
    keys: Any  # [H, R, d]
    scores: Any  # [G, R, width]
    queries: Any  # [G, R, padded]
    fixed: Any  # [G, R, padded]
    norms: Any  # [G, R]
    iterates: Any  # [2, H, R, d]
    weights: Any  # [2, R, R, H]
    shares: Any  # [2, R, H]
    errors: Any  # [2, H, R]
    sizes: Any  # [2, H, R]
    merged_lse: Any  # [H, R]
    start: Any  # [H, R]
    lse_parts: Any  # [3, H, R]: what scores were measured from, the sum of exponentials, that without the own one
    changes: Any  # [H, R]: of the own weight since y = v
    base: Any  # [H + 2, padded]
    verdict: Any  # [1]


def scratch_sizes(heads: int, groups: int, dim: int, padded: int, width: int, block: int) -> tuple[int, ...]:
    """Return the elements of each part of the scratch, in the order of `Tensors`."""
    return (
        groups * (block + R) * padded, groups * dim * width, heads * 2 * R * dim, groups * 2 * R * heads * padded,
        heads * R * dim, groups * R * width, groups * R * padded, groups * R * padded, groups * R,
        2 * heads * R * dim, 2 * R * R * heads, 2 * R * heads, 2 * heads * R, 2 * heads * R, heads * R, heads * R,
        3 * heads * R, heads * R, (heads + 2) * padded, 1,
    )  # fmt: skip


@fast
def dot(a: Any, b: Any, n: int, total: Any) -> Any:
    """`total + a . b`."""
    for i in range(n):
        total += a[i] * b[i]
    return total


@compiled({"nnan", "nsz"})
def _peak(a: Any, n: int, peak: Any) -> Any:
    for i in range(n):
        peak = a[i] if a[i] > peak else peak
    return peak


@fast
def _scale_and_add(a: Any, n: int, scale: Any, bias: Any, biased: bool) -> None:
    if biased:
        for i in range(n):
            a[i] = a[i] * scale + bias[i]
    else:
        for i in range(n):
            a[i] = a[i] * scale


@fast
def _exponentials(a: Any, n: int, peak: Any, total: Any) -> Any:
    for i in range(n):
        a[i] = exp_of(a[i] - peak)
        total += a[i]
    return total


@fast
def _mix(out: Any, n: int, weight: Any, other: Any, share: Any) -> None:
    """`out = weight out + share other`."""
    for i in range(n):
        out[i] = weight * out[i] + share * other[i]


@fast
def _add(out: Any, n: int, other: Any, share: Any) -> None:
    for i in range(n):
        out[i] += share * other[i]


@fast
def _copy(out: Any, other: Any, n: int) -> None:
    for i in range(n):
        out[i] = other[i]


@fast
def _fill(out: Any, n: int, value: Any) -> None:
    for i in range(n):
        out[i] = value


@fast
def _combine(out: Any, share: Any, before: Any, p: Any, value: Any, stride: int, n: int) -> None:
    """`out = share before + sum_j p_j value_j` over four rows of values."""
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    v1, v2, v3 = shifted(value, stride), shifted(value, 2 * stride), shifted(value, 3 * stride)
    for i in range(n):
        out[i] = share * before[i] + p0 * value[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]


@exact
def _largest(a: Any, n: int) -> Any:
    """The largest modulus; NaN if there is one."""
    best = bits(abs(a[0]))
    for i in range(n):
        best = max(best, bits(abs(a[i])))
    return number_of(best)


@exact
def _largest_difference(a: Any, b: Any, n: int) -> Any:
    best = bits(abs(a[0] - b[0]))
    for i in range(n):
        best = max(best, bits(abs(a[i] - b[i])))
    return number_of(best)


@fast
def _turn(q: Any, cos: Any, sin: Any, half: int) -> None:
    other = shifted(q, half)
    for i in range(half):
        a, b = q[i], other[i]
        q[i] = a * cos[i] - b * sin[i]
        other[i] = a * sin[i] + b * cos[i]


@exact
def _tensors(c: Any, f: Any, slot: int) -> Tensors:
    s = pointer_like(f, c[SCRATCH])
    heads, groups, d, padded, width, block = c[HEADS], c[GROUPS], c[DIM], c[PADDED], c[WIDTH], c[BLOCK]
    values = shifted(s, slot * c[SLOT])
    columns = shifted(values, groups * (block + R) * padded)
    inputs = shifted(columns, groups * d * width)
    made = shifted(inputs, heads * 2 * R * d)
    keys = shifted(made, groups * 2 * R * heads * padded)
    scores = shifted(keys, heads * R * d)
    queries = shifted(scores, groups * R * width)
    fixed = shifted(queries, groups * R * padded)
    norms = shifted(fixed, groups * R * padded)
    iterates = shifted(norms, groups * R)
    weights = shifted(iterates, 2 * heads * R * d)
    shares = shifted(weights, 2 * R * R * heads)
    errors = shifted(shares, 2 * R * heads)
    sizes = shifted(errors, 2 * heads * R)
    merged_lse = shifted(sizes, 2 * heads * R)
    start = shifted(merged_lse, heads * R)
    lse_parts = shifted(start, heads * R)
    changes = shifted(lse_parts, 3 * heads * R)
    base = shifted(changes, heads * R)
    verdict = shifted(base, (heads + 2) * padded)
    return Tensors(
        pointer_like(f, c[KEY]), pointer_like(f, c[VALUE]), pointer_like(f, c[WEIGHT]), pointer_like(f, c[CONSTANT]),
        pointer_like(f, c[ADDED]), pointer_like(f, c[TURN]), pointer_like(f, c[Y]), pointer_like(f, c[QUERY]),
        pointer_like(f, c[INVERSE]), pointer_like(f, c[LSE]), pointer_like(f, c[RESIDUAL]), pointer_like(f, c[SIZE]),
        pointer_like(f, c[STRICT]), pointer_like(f, c[GIVEN]), f, pointer_like(f, c[BEFORE_Y]),
        pointer_like(f, c[BEFORE_LSE]), values, columns, inputs, made, keys, scores, queries, fixed, norms, iterates,
        weights, shares, errors, sizes, merged_lse, start, lse_parts, changes, base, verdict,
    )  # fmt: skip


@fast
def _unturn(q: Any, cos: Any, sin: Any, half: int) -> None:
    other = shifted(q, half)
    for i in range(half):
        a, b = q[i], other[i]
        q[i] = a * cos[i] + b * sin[i]
        other[i] = b * cos[i] - a * sin[i]


@fast
def _norm_and_turn(c: Any, t: Any, q: Any, b: int, row: int) -> Any:
    """Norm and rotate one query in place; return what the norm multiplied it with."""
    f, d = t.numbers, c[DIM]
    inverse = f[ONE]
    if c[INVERSE] != 0:
        inverse = f[ONE] / math.sqrt(dot(q, q, d, f[ZERO]) * f[INVERSE_DIM] + f[EPS])
        for i in range(d):
            q[i] *= inverse
    if c[TURN] != 0:
        cos = shifted(t.turn, b * c[TURN_B] + row * (d // 2))
        _turn(q, cos, shifted(cos, c[TURN_HALF]), d // 2)
    return inverse


@exact
def _take_values(c: Any, t: Any, b: int, g: int) -> None:
    """Copy a group's values into padded rows."""
    n, d, padded, zero = c[STOP] - c[FIRST], c[DIM], c[PADDED], t.numbers[ZERO]
    rows = shifted(t.values, g * (c[BLOCK] + R) * padded)
    for j in range(n):
        source = shifted(t.value, b * c[VALUE_B] + g * c[VALUE_G] + (c[FIRST] + j) * c[VALUE_N])
        _copy(shifted(rows, j * padded), source, d)
        _fill(shifted(rows, j * padded + d), padded - d, zero)
    _fill(shifted(rows, n * padded), R * padded, zero)


@fast
def _attend_before(c: Any, t: Any, b: int, h: int, s: int, m: int) -> None:
    """Merge attention to the block's rows before `s` into what the rows `s .. s + m` saw before; fill `inputs`."""
    f, d, padded, width = t.numbers, c[DIM], c[PADDED], c[WIDTH]
    zero, one = f[ZERO], f[ONE]
    g = h // (c[HEADS] // c[GROUPS])
    values = shifted(t.values, g * (c[BLOCK] + R) * padded)
    keys, a = shifted(t.keys, h * R * d), shifted(t.inputs, h * 2 * R * d)
    for i in range(R):
        _copy(shifted(a, (R + i) * d), shifted(values, (s + i) * padded), d)
        if i >= m:
            _fill(shifted(keys, i * d), d, zero)
            _fill(shifted(a, i * d), d, zero)
            continue
        row = c[FIRST] + s + i
        _copy(shifted(keys, i * d), shifted(t.key, b * c[KEY_B] + h * c[KEY_H] + row * c[KEY_N]), d)
        y = shifted(t.y, ((b * c[LENGTH] + row) * c[HEADS] + h) * d)
        _copy(shifted(a, i * d), y, d)
        t.merged_lse[h * R + i] = t.lse[(b * c[HEADS] + h) * c[LENGTH] + row]
    if s == 0:
        return
    scores, out = shifted(t.scores, g * R * width), shifted(t.queries, g * R * padded)
    for j in range(0, s, c[VECTOR]):
        tile4(shifted(scores, j), width, keys, d, 1, shifted(t.columns, g * d * width + j), width, d)
    n = c[STOP] - c[FIRST]
    for i in range(m):
        row = shifted(scores, i * width)
        bias = shifted(t.strict, b * c[STRICT_B] + h * c[STRICT_H] + (s + i) * n)
        _scale_and_add(row, s, f[SCALE], bias, c[STRICT] != 0)
        old = t.merged_lse[h * R + i]
        peak = _peak(row, s, old)
        if peak == -f[INFINITY]:
            _fill(row, s, zero)
            continue
        share = exp_of(old - peak)
        total = _exponentials(row, s, peak, zero) + share
        t.merged_lse[h * R + i] = peak + math.log(total)
        inverse = one / total
        for j in range(s):
            row[j] *= inverse
        share *= inverse
        y = shifted(a, i * d)
        for j in range(d):
            y[j] *= share
    for i in range(m, R):
        _fill(shifted(scores, i * width), s, zero)
    for j in range(0, padded, c[VECTOR]):
        tile4(shifted(out, j), padded, scores, width, 1, shifted(values, j), padded, s)
    for i in range(m):
        _add(shifted(a, i * d), d, shifted(out, i * padded), one)


@fast
def _make(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """What Omega_Q makes of each head's attention before the rows and of their values; the rest of the query."""
    d, padded, heads = c[DIM], c[PADDED], c[HEADS]
    made = shifted(t.made, g * 2 * R * heads * padded)
    if c[WEIGHT] == 0:
        for i in range(2 * R):
            _copy(shifted(made, i * padded), shifted(t.inputs, i * d), d)
    else:
        for h in range(heads):
            weight, a = shifted(t.weight, (g * heads + h) * d * padded), shifted(t.inputs, h * 2 * R * d)
            for j in range(0, padded, c[VECTOR]):
                out = shifted(made, h * padded + j)
                tile8(out, heads * padded, a, d, 1, shifted(weight, j), padded, d)
    for i in range(m):
        fixed = shifted(t.fixed, (g * R + i) * padded)
        _fill(fixed, padded, t.numbers[ZERO])
        if c[CONSTANT] != 0:
            _add(fixed, d, shifted(t.constant, g * d), t.numbers[ONE])
        if c[ADDED] != 0:
            row = b * c[LENGTH] + c[FIRST] + s + i
            _add(fixed, d, shifted(t.added, (row * c[GROUPS] + g) * d), t.numbers[ONE])


@fast
def _own_bias(c: Any, t: Any, b: int, h: int, i: int) -> Any:
    if c[STRICT] == 0:
        return t.numbers[ZERO]
    n = c[STOP] - c[FIRST]
    return t.strict[b * c[STRICT_B] + h * c[STRICT_H] + i * n + i]


@fast
def _start(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """The first iterate: attention before the rows. And scores of the own columns at y = v."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    zero, one = f[ZERO], f[ONE]
    made, q = shifted(t.made, g * 2 * R * heads * padded), shifted(t.queries, g * R * padded)
    shared = heads // c[GROUPS]
    for i in range(m):
        if c[GIVEN] == 0:
            _copy(q, shifted(t.fixed, (g * R + i) * padded), d)
            for h in range(heads):
                _add(q, d, shifted(made, ((R + i) * heads + h) * padded), one)
            _norm_and_turn(c, t, q, b, c[FIRST] + s + i)
        for h in range(g * shared, (g + 1) * shared):
            own = _own_bias(c, t, b, h, s + i)
            if c[GIVEN] == 0:
                own += dot(shifted(t.keys, (h * R + i) * d), q, d, zero) * f[SCALE]
            else:
                own += t.given[(b * heads + h) * c[LENGTH] + c[FIRST] + s + i]
            t.start[h * R + i] = own
            sees = t.merged_lse[h * R + i] != -f[INFINITY]
            for j in range(R):
                t.weights[(i * R + j) * heads + h] = one if j == i and not sees else zero
            t.shares[i * heads + h] = one if sees else zero
            source = shifted(t.inputs, (h * 2 * R + i) * d) if sees else shifted(t.inputs, (h * 2 * R + R + i) * d)
            _copy(shifted(t.iterates, (h * R + i) * d), source, d)


@fast
def _sweep(c: Any, t: Any, b: int, g: int, s: int, m: int, parity: int) -> None:
    """Evaluate the map at the iterate of one parity; leave the next one in the other."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    one = f[ONE]
    made, q = shifted(t.made, g * 2 * R * heads * padded), shifted(t.queries, g * R * padded)
    weights, shares = shifted(t.weights, parity * R * R * heads), shifted(t.shares, parity * R * heads)
    of_values = shifted(made, R * heads * padded)
    for j in range(0, padded, c[VECTOR]):
        tile4(shifted(q, j), padded, weights, R * heads, 1, shifted(of_values, j), padded, m * heads)
    for i in range(m):
        row = shifted(q, i * padded)
        _add(row, d, shifted(t.fixed, (g * R + i) * padded), one)
        for h in range(heads):
            _add(row, d, shifted(made, (i * heads + h) * padded), shares[i * heads + h])
        t.norms[g * R + i] = _norm_and_turn(c, t, row, b, c[FIRST] + s + i)
    shared = heads // c[GROUPS]
    for h in range(g * shared, (g + 1) * shared):
        for i in range(m):
            _attend(c, t, b, g, h, s, i, parity)


@fast
def _attend(c: Any, t: Any, b: int, g: int, h: int, s: int, i: int, parity: int) -> None:
    """One row of one head: its weights on the rows up to itself, its output, its residual."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    zero, one, infinity = f[ZERO], f[ONE], f[INFINITY]
    key, q = shifted(t.keys, (h * R + i) * d), shifted(t.queries, g * R * padded)
    other = 1 - parity
    weights, n = shifted(t.weights, (other * R + i) * R * heads), c[STOP] - c[FIRST]
    p = shifted(t.scores, g * R * c[WIDTH])  # the row's weights
    old, peak = t.merged_lse[h * R + i], t.merged_lse[h * R + i]
    for j in range(i):
        score = dot(key, shifted(q, j * padded), d, zero) * f[SCALE]
        if c[STRICT] != 0:
            score += t.strict[b * c[STRICT_B] + h * c[STRICT_H] + (s + i) * n + s + j]
        p[j] = score
        peak = score if score > peak else peak
    start = t.start[h * R + i]
    own = start
    if c[GIVEN] == 0:
        own = dot(key, shifted(q, i * padded), d, zero) * f[SCALE] + _own_bias(c, t, b, h, s + i)
    p[i] = own
    for j in range(i + 1, R):
        p[j] = -infinity
    peak = max(peak, max(own, start))
    share, total, far = zero, zero, zero
    if peak == -infinity:
        peak = zero
    share = exp_of(old - peak)
    rest = share
    for j in range(i):
        p[j] = exp_of(p[j] - peak)
        rest += p[j]
    p[i] = exp_of(own - peak)
    total = rest + p[i]
    for j in range(i + 1, R):
        p[j] = zero
    inverse = zero if total == zero else one / total
    if c[GIVEN] == 0 and own != -infinity:
        first = exp_of(start - peak)
        far = abs(first / (rest + first) - p[i] * inverse)
    for j in range(R):
        p[j] *= inverse
        weights[j * heads + h] = p[j]
    t.shares[(other * R + i) * heads + h] = share * inverse
    t.lse_parts[h * R + i] = peak
    t.lse_parts[(heads + h) * R + i] = total
    t.lse_parts[(2 * heads + h) * R + i] = rest
    t.changes[h * R + i] = far
    out = shifted(t.iterates, ((other * heads + h) * R + i) * d)
    values = shifted(t.values, (g * (c[BLOCK] + R) + s) * padded)
    _combine(out, share * inverse, shifted(t.inputs, (h * 2 * R + i) * d), p, values, padded, d)
    error = _largest_difference(out, shifted(t.iterates, ((parity * heads + h) * R + i) * d), d)
    t.errors[(other * heads + h) * R + i] = error
    t.sizes[(other * heads + h) * R + i] = _largest(out, d)


@exact
def _settled(c: Any, t: Any, b: int, s: int, m: int, other: int, write: bool) -> int:
    """1 if all rows are within tolerance, 0 if not yet, -1 if one is lost; `write`: record their residuals."""
    heads, f = c[HEADS], t.numbers
    verdict = 1
    for i in range(m):
        error, size = f[ZERO], f[ZERO]
        for h in range(heads):
            one = t.errors[(other * heads + h) * R + i]
            if not one < f[INFINITY]:
                return -1
            error, size = max(error, one), max(size, t.sizes[(other * heads + h) * R + i])
        if not error <= f[ATOL] + f[RTOL] * size:
            verdict = 0
        if write:
            row = b * c[LENGTH] + c[FIRST] + s + i
            t.residual[row], t.size[row] = error, size
    return verdict


@fast
def _own_root(c: Any, t: Any, b: int, s: int, i: int, other: int, p: Any) -> bool:
    """Solve a row's own equation, given what it attends to in other columns."""
    d, padded, heads, groups, f = c[DIM], c[PADDED], c[HEADS], c[GROUPS], t.numbers
    shared, normed = heads // groups, c[INVERSE] != 0
    alpha, beta, offset = np.empty(heads), np.empty((heads, heads)), np.empty(heads)
    gram = np.empty((groups if normed else 0, heads + 1, heads + 1))
    for g in range(groups):
        made = shifted(t.made, g * 2 * R * heads * padded)
        q = t.base  # [1 + H, padded]: q(p) = q_0 + sum_h p_h q_h
        _copy(q, shifted(t.fixed, (g * R + i) * padded), d)
        for h in range(heads):
            rest, total = t.lse_parts[(2 * heads + h) * R + i], t.lse_parts[(heads + h) * R + i]
            scale = f[ZERO] if rest == f[ZERO] else total / rest
            others = shifted(q, (1 + h) * padded)
            _fill(others, d, f[ZERO])
            _add(others, d, shifted(made, (i * heads + h) * padded), scale * t.shares[(other * R + i) * heads + h])
            for j in range(i):
                weight = scale * t.weights[((other * R + i) * R + j) * heads + h]
                _add(others, d, shifted(made, ((R + j) * heads + h) * padded), weight)
            _add(q, d, others, f[ONE])
            _mix(others, d, -f[ONE], shifted(made, ((R + i) * heads + h) * padded), f[ONE])
        if normed:
            for h in range(heads + 1):
                for j in range(h + 1):
                    square = dot(shifted(q, h * padded), shifted(q, j * padded), d, f[ZERO]) * f[INVERSE_DIM]
                    gram[g, h, j] = square
                    gram[g, j, h] = square
            gram[g, 0, 0] += f[EPS]
        for h in range(g * shared, (g + 1) * shared):
            key = shifted(t.base, (1 + heads) * padded)
            _copy(key, shifted(t.keys, (h * R + i) * d), d)
            if c[TURN] != 0:
                cos = shifted(t.turn, b * c[TURN_B] + (c[FIRST] + s + i) * (d // 2))
                _unturn(key, cos, shifted(cos, c[TURN_HALF]), d // 2)
            alpha[h] = dot(key, q, d, f[ZERO]) * f[SCALE]
            for j in range(heads):
                beta[h, j] = dot(key, shifted(q, (1 + j) * padded), d, f[ZERO]) * f[SCALE]
            rest = t.lse_parts[(2 * heads + h) * R + i]
            own = _own_bias(c, t, b, h, s + i)
            if own == -f[INFINITY]:
                offset[h] = -math.inf
            else:
                offset[h] = math.inf if rest == f[ZERO] else own - t.lse_parts[h * R + i] - math.log(rest)
    return solve(alpha, beta, offset, gram, p)


@fast
def _move(c: Any, t: Any, s: int, i: int, other: int, p: Any) -> None:
    """Give a row of the next iterate the own weights `p`."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    four = t.base
    for h in range(heads):
        rest, total = t.lse_parts[(2 * heads + h) * R + i], t.lse_parts[(heads + h) * R + i]
        if rest == f[ZERO]:
            continue
        scale = f[ONE] * (1.0 - p[h]) * total / rest
        weights = shifted(t.weights, (other * R + i) * R * heads + h)
        for j in range(R):
            if j < i:
                weights[j * heads] *= scale
            elif j == i:
                weights[j * heads] = p[h]
            four[j] = weights[j * heads]
        share = shifted(t.shares, (other * R + i) * heads + h)
        share[0] *= scale
        values = shifted(t.values, (h // (heads // c[GROUPS]) * (c[BLOCK] + R) + s) * padded)
        out = shifted(t.iterates, ((other * heads + h) * R + i) * d)
        _combine(out, share[0], shifted(t.inputs, (h * 2 * R + i) * d), four, values, padded, d)


@exact
def _repair(c: Any, t: Any, b: int, s: int, m: int, other: int, all_rows: bool) -> int:
    """Put all rows, or those whose own weight is far from that at y = v, at the roots of their own equations.

    Returns:
        1 if all were there, 0 if not, -1 if one cannot be solved.
    """
    verdict, p = 1, np.empty(c[HEADS])
    for i in range(m):
        far = all_rows
        for h in range(c[HEADS]):
            far = far or not t.changes[h * R + i] <= t.numbers[NEAR]
        if not far:
            continue
        if not _own_root(c, t, b, s, i, other, p):
            return -1
        moved = 0.0
        for h in range(c[HEADS]):
            moved = max(moved, abs(p[h] - t.weights[((other * R + i) * R + i) * c[HEADS] + h]))
        if all_rows or moved > t.numbers[SAME_ROOT]:
            _move(c, t, s, i, other, p)
            if moved > t.numbers[SAME_ROOT]:
                verdict = 0
    return verdict


@exact
def _worst(c: Any, t: Any, m: int, other: int) -> Any:
    worst = t.numbers[ZERO]
    for i in range(m):
        for h in range(c[HEADS]):
            worst = max(worst, t.errors[(other * c[HEADS] + h) * R + i])
    return worst


@exact
def _write(c: Any, t: Any, b: int, g: int, s: int, m: int, parity: int) -> None:
    """Hand over the iterate at which the map was evaluated, its queries and log-sum-exp."""
    d, padded, heads, width, f = c[DIM], c[PADDED], c[HEADS], c[WIDTH], t.numbers
    shared, n = heads // c[GROUPS], c[STOP] - c[FIRST]
    for i in range(m):
        row, q = c[FIRST] + s + i, shifted(t.queries, (g * R + i) * padded)
        at = (b * c[LENGTH] + row) * c[GROUPS] + g
        _copy(shifted(t.query, at * d), q, d)
        if c[INVERSE] != 0:
            t.inverse[at] = t.norms[g * R + i]
        column = shifted(t.columns, g * d * width + s + i)
        for k in range(d):
            column[k * width] = q[k]
        for h in range(g * shared, (g + 1) * shared):
            y = shifted(t.y, ((b * c[LENGTH] + row) * heads + h) * d)
            _copy(shifted(t.before_y, ((b * n + s + i) * heads + h) * d), y, d)
            _copy(y, shifted(t.iterates, ((parity * heads + h) * R + i) * d), d)
            at = (b * heads + h) * c[LENGTH] + row
            t.before_lse[(b * heads + h) * n + s + i] = t.lse[at]
            total = t.lse_parts[(heads + h) * R + i]
            t.lse[at] = -f[INFINITY] if total == f[ZERO] else t.lse_parts[h * R + i] + math.log(total)


@exact
def _wait(c: Any) -> None:
    if c[TEAM] > 1:
        call(c[BARRIER])


@exact
def _settle_rows(c: Any, t: Any, b: int, low: int, high: int, s: int, m: int, leads: bool, sweeps: Any) -> bool:
    """Settle a few rows of a sample; this thread has groups `low .. high`."""
    shared = c[HEADS] // c[GROUPS]
    for h in range(low * shared, high * shared):
        _attend_before(c, t, b, h, s, m)
    _wait(c)
    for g in range(low, high):
        _make(c, t, b, g, s, m)
        _start(c, t, b, g, s, m)
    _wait(c)
    verdict, parity, slow, before = 0, 1, False, t.numbers[INFINITY]
    for sweep in range(MOST_SWEEPS):
        parity = 1 - parity
        for g in range(low, high):
            _sweep(c, t, b, g, s, m, parity)
        _wait(c)
        verdict = _settled(c, t, b, s, m, 1 - parity, False)
        if verdict < 0:
            break
        worst = _worst(c, t, m, 1 - parity)
        slow = slow or (sweep >= PATIENCE and worst > t.numbers[SLOW] * before)
        before = worst
        if c[GIVEN] == 0 and (verdict == 1 or slow or sweep == 0):
            if leads:
                t.verdict[0] = _repair(c, t, b, s, m, 1 - parity, slow and verdict == 0)
            _wait(c)
            if verdict == 1 or slow:
                verdict = min(verdict, int(t.verdict[0]))
        if verdict != 0:
            break
    if verdict < 1:
        return False
    for g in range(low, high):
        _write(c, t, b, g, s, m, parity)
    if leads:
        _settled(c, t, b, s, m, 1 - parity, True)
        for i in range(m):
            sweeps[b * c[LENGTH] + c[FIRST] + s + i] = sweep + 1
    return True


@exact
def _sample(c: Any, t: Any, b: int, low: int, high: int, leads: bool, sweeps: Any) -> int:
    """Settle a sample's rows; return how many are."""
    n = c[STOP] - c[FIRST]
    for g in range(low, high):
        _take_values(c, t, b, g)
    for s in range(0, n, R):
        if not _settle_rows(c, t, b, low, high, s, min(R, n - s), leads, sweeps):
            return s
    return n


@exact
def _block(c: Any, f: Any) -> None:
    """This thread's part of the block: some samples, or some groups of all samples."""
    thread = call(c[THREAD]) if c[COUNT] > 1 else 0
    sweeps, status = pointer_like(c, c[SWEEPS]), pointer_like(c, c[STATUS])
    if c[TEAM] == 1:
        t = _tensors(c, f, thread)
        for b in range(thread, c[BATCH], c[COUNT]):
            status[b] = _sample(c, t, b, 0, c[GROUPS], True, sweeps)
    else:
        t = _tensors(c, f, 0)
        low, high = c[GROUPS] * thread // c[TEAM], c[GROUPS] * (thread + 1) // c[TEAM]
        for b in range(c[BATCH]):
            done = _sample(c, t, b, low, high, thread == 0, sweeps)
            _wait(c)
            if thread == 0:
                status[b] = done


@kernel
def forward32(c: Any) -> None:
    """The kernel in float32."""
    _block(c, float32_at(c[NUMBERS]))


@kernel
def forward64(c: Any) -> None:
    """The kernel in float64."""
    _block(c, float64_at(c[NUMBERS]))
