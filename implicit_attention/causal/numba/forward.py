"""The compiled forward pass of one diagonal block; `README.md` beside this file derives it.

Rows are settled four at a time. What the query map makes of their values and of the attention before them is computed
once, by head; outputs are combinations of those, so a sweep needs no product with Omega_Q.
"""

import math
from typing import Any

from implicit_attention.causal.numba.layout import (
    ADDED,
    ATOL,
    BARRIER,
    BATCH,
    BLOCK,
    CONSTANT,
    COUNT,
    DIM,
    EPS,
    FIRST,
    GIVEN,
    GROUPS,
    HEADS,
    INFINITY,
    INVERSE,
    INVERSE_DIM,
    KEY_B,
    KEY_H,
    KEY_N,
    LENGTH,
    NUMBERS,
    ONE,
    PADDED,
    RTOL,
    SCALE,
    SLOW,
    STATUS,
    STOP,
    STRICT,
    STRICT_B,
    STRICT_H,
    SWEEPS,
    TEAM,
    THREAD,
    TURN,
    TURN_B,
    TURN_HALF,
    VALUE_B,
    VALUE_G,
    VALUE_N,
    VECTOR,
    WEIGHT,
    WIDTH,
    ZERO,
    R,
    tensors,
)
from implicit_attention.causal.numba.machine import (
    STAMP,
    call,
    exact,
    exp_of,
    fast,
    float32_at,
    float64_at,
    kernel,
    pointer_like,
    shifted,
    tile1,
    tile1_wide,
    tile4,
    tile8,
)
from implicit_attention.causal.numba.own_rows import own_bias, repair
from implicit_attention.causal.numba.vectors import (
    add,
    add_both,
    combine,
    copy,
    dot,
    exponentials,
    fill,
    largest,
    moved,
    peak_of,
    scale_and_add,
    turn,
)

MOST_SWEEPS = 32
PATIENCE = 8  # sweeps after which rows that still settle slowly have their own equations solved


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
        turn(q, cos, shifted(cos, c[TURN_HALF]), d // 2)
    return inverse


@exact
def _take_values(c: Any, t: Any, b: int, g: int) -> None:
    """Copy a group's values into padded rows."""
    n, d, padded, zero = c[STOP] - c[FIRST], c[DIM], c[PADDED], t.numbers[ZERO]
    rows = shifted(t.values, g * (c[BLOCK] + R) * padded)
    for j in range(n):
        source = shifted(t.value, b * c[VALUE_B] + g * c[VALUE_G] + (c[FIRST] + j) * c[VALUE_N])
        copy(shifted(rows, j * padded), source, d)
        fill(shifted(rows, j * padded + d), padded - d, zero)
    fill(shifted(rows, n * padded), R * padded, zero)


@fast
def _attend_before(c: Any, t: Any, b: int, h: int, s: int, m: int) -> None:
    """Merge attention to the block's rows before `s` into what the rows `s .. s + m` saw before; fill `inputs`."""
    f, d, padded, width, heads = t.numbers, c[DIM], c[PADDED], c[WIDTH], c[HEADS]
    zero, one = f[ZERO], f[ONE]
    g = h // (heads // c[GROUPS])
    values = shifted(t.values, g * (c[BLOCK] + R) * padded)
    keys, a = shifted(t.keys, h * R * d), shifted(t.inputs, h * 2 * R * d)
    for i in range(R):
        copy(shifted(a, (R + i) * d), shifted(values, (s + i) * padded), d)
        if i >= m:
            fill(shifted(keys, i * d), d, zero)
            fill(shifted(a, i * d), d, zero)
            continue
        row = c[FIRST] + s + i
        copy(shifted(keys, i * d), shifted(t.key, b * c[KEY_B] + h * c[KEY_H] + row * c[KEY_N]), d)
        y = shifted(t.y, ((b * c[LENGTH] + row) * c[HEADS] + h) * d)
        copy(shifted(a, i * d), y, d)
        t.merged_lse[i * heads + h] = t.lse[(b * c[HEADS] + h) * c[LENGTH] + row]
    if s == 0:
        return
    scores, out = shifted(t.scores, g * (R * width + c[HEADS])), shifted(t.queries, g * R * padded)
    for j in range(0, s, c[VECTOR]):
        tile4(shifted(scores, j), width, keys, d, 1, shifted(t.columns, g * d * width + j), width, d)
    n = c[STOP] - c[FIRST]
    for i in range(m):
        row = shifted(scores, i * width)
        bias = shifted(t.strict, b * c[STRICT_B] + h * c[STRICT_H] + (s + i) * n)
        scale_and_add(row, s, f[SCALE], bias, c[STRICT] != 0)
        old = t.merged_lse[i * heads + h]
        peak = peak_of(row, s, old)
        if peak == -f[INFINITY]:
            fill(row, s, zero)
            continue
        share = exp_of(old - peak)
        total = exponentials(row, s, peak, zero) + share
        t.merged_lse[i * heads + h] = peak + math.log(total)
        inverse = one / total
        for j in range(s):
            row[j] *= inverse
        share *= inverse
        y = shifted(a, i * d)
        for j in range(d):
            y[j] *= share
    for i in range(m, R):
        fill(shifted(scores, i * width), s, zero)
    for j in range(0, padded, c[VECTOR]):
        tile4(shifted(out, j), padded, scores, width, 1, shifted(values, j), padded, s)
    for i in range(m):
        add(shifted(a, i * d), d, shifted(out, i * padded), one)


@fast
def _make(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """What Omega_Q makes of each head's attention before the rows and of their values; the rest of the query."""
    d, padded, heads = c[DIM], c[PADDED], c[HEADS]
    made = shifted(t.made, g * 2 * R * heads * padded)
    if c[WEIGHT] == 0:
        for i in range(2 * R):
            copy(shifted(made, i * padded), shifted(t.inputs, i * d), d)
    else:
        for h in range(heads):
            weight, a = shifted(t.weight, (g * heads + h) * d * padded), shifted(t.inputs, h * 2 * R * d)
            for j in range(0, padded, c[VECTOR]):
                out = shifted(made, h * padded + j)
                tile8(out, heads * padded, a, d, 1, shifted(weight, j), padded, d)
    for i in range(m):
        fixed = shifted(t.fixed, (g * R + i) * padded)
        fill(fixed, padded, t.numbers[ZERO])
        if c[CONSTANT] != 0:
            add(fixed, d, shifted(t.constant, g * d), t.numbers[ONE])
        if c[ADDED] != 0:
            row = b * c[LENGTH] + c[FIRST] + s + i
            add(fixed, d, shifted(t.added, (row * c[GROUPS] + g) * d), t.numbers[ONE])


@fast
def _start(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """The first iterate: attention before the rows. And scores of the own columns at y = v."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    zero, one = f[ZERO], f[ONE]
    made, q = shifted(t.made, g * 2 * R * heads * padded), shifted(t.queries, g * R * padded)
    shared, ones = heads // c[GROUPS], shifted(t.scores, g * (R * c[WIDTH] + c[HEADS]))
    fill(ones, heads, one)
    for i in range(m):
        if c[GIVEN] == 0:
            for j in range(0, padded, c[VECTOR]):
                of_value = shifted(made, (R + i) * heads * padded + j)
                tile1(shifted(q, j), padded, ones, heads, 1, of_value, padded, heads)
            add(q, d, shifted(t.fixed, (g * R + i) * padded), one)
            _norm_and_turn(c, t, q, b, c[FIRST] + s + i)
        for h in range(g * shared, (g + 1) * shared):
            own = own_bias(c, t, b, h, s + i)
            if c[GIVEN] == 0:
                own += dot(shifted(t.keys, (h * R + i) * d), q, d, zero) * f[SCALE]
            else:
                own += t.given[(b * heads + h) * c[LENGTH] + c[FIRST] + s + i]
            t.start[i * heads + h] = own
            sees = t.merged_lse[i * heads + h] != -f[INFINITY]
            for j in range(R):
                t.weights[(i * R + j) * heads + h] = one if j == i and not sees else zero
            t.shares[i * heads + h] = one if sees else zero
            t.before_sizes[i * heads + h] = largest(shifted(t.inputs, (h * 2 * R + i) * d), d)
            t.value_sizes[i * heads + h] = largest(shifted(t.inputs, (h * 2 * R + R + i) * d), d)


@fast
def _sweep(c: Any, t: Any, b: int, g: int, s: int, m: int, parity: int) -> None:
    """Make a group's queries at the iterate of one parity, and the scores of the rows on each other."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    made, q = shifted(t.made, g * 2 * R * heads * padded), shifted(t.queries, g * R * padded)
    weights, shares = shifted(t.weights, parity * R * R * heads), shifted(t.shares, parity * R * heads)
    of_values = shifted(made, R * heads * padded)
    for j in range(0, padded, c[VECTOR]):
        tile4(shifted(q, j), padded, weights, R * heads, 1, shifted(of_values, j), padded, m * heads)
    wide = padded - padded % (2 * c[VECTOR])
    for i in range(m):
        row, before = shifted(q, i * padded), shifted(t.base, g * padded)
        share, of_before = shifted(shares, i * heads), shifted(made, i * heads * padded)
        for j in range(0, wide, 2 * c[VECTOR]):
            tile1_wide(shifted(before, j), padded, share, heads, 1, shifted(of_before, j), padded, heads)
        for j in range(wide, padded, c[VECTOR]):
            tile1(shifted(before, j), padded, share, heads, 1, shifted(of_before, j), padded, heads)
        add_both(row, d, before, shifted(t.fixed, (g * R + i) * padded))
        t.norms[g * R + i] = _norm_and_turn(c, t, row, b, c[FIRST] + s + i)
    shared, n = heads // c[GROUPS], c[STOP] - c[FIRST]
    for h in range(g * shared, (g + 1) * shared):
        bias = shifted(t.strict, b * c[STRICT_B] + h * c[STRICT_H] + s * n + s)
        for i in range(m):
            key = shifted(t.keys, (h * R + i) * d)
            for j in range(i + 1):
                score = t.start[i * heads + h]
                if j < i or c[GIVEN] == 0:
                    score = dot(key, shifted(q, j * padded), d, f[ZERO]) * f[SCALE]
                    if c[STRICT] != 0:
                        score += bias[i * n + j]
                t.pairs[(i * R + j) * heads + h] = score


@fast
def _weigh(c: Any, t: Any, low: int, high: int, i: int, parity: int) -> None:
    """One row's weights on the rows up to itself in the heads `low .. high`; how far they moved its output at most."""
    heads, f = c[HEADS], t.numbers
    zero, one, infinity, other = f[ZERO], f[ONE], f[INFINITY], 1 - parity
    scores, weights = shifted(t.pairs, i * R * heads), shifted(t.weights, (other * R + i) * R * heads)
    last, last_share = shifted(t.weights, (parity * R + i) * R * heads), shifted(t.shares, (parity * R + i) * heads)
    peak, total = shifted(t.lse_parts, i * heads), shifted(t.lse_parts, (R + i) * heads)
    rest, share = shifted(t.lse_parts, (2 * R + i) * heads), shifted(t.shares, (other * R + i) * heads)
    old, start, bound = (
        shifted(t.merged_lse, i * heads), shifted(t.start, i * heads), shifted(t.bounds, (other * R + i) * heads)
    )  # fmt: skip
    for h in range(low, high):
        top = old[h] if old[h] > start[h] else start[h]
        peak[h] = top
    for j in range(i + 1):
        score = shifted(scores, j * heads)
        for h in range(low, high):
            peak[h] = score[h] if score[h] > peak[h] else peak[h]
    for h in range(low, high):
        peak[h] = zero if peak[h] == -infinity else peak[h]
        share[h] = exp_of(old[h] - peak[h])
        rest[h] = share[h]
    for j in range(i + 1):
        score, p = shifted(scores, j * heads), shifted(weights, j * heads)
        for h in range(low, high):
            p[h] = exp_of(score[h] - peak[h])
            total[h] = rest[h] + p[h]
        if j < i:
            for h in range(low, high):
                rest[h] = total[h]
    own, change = shifted(weights, i * heads), shifted(t.changes, i * heads)
    for h in range(low, high):
        inverse = zero if total[h] == zero else one / total[h]
        first = exp_of(start[h] - peak[h])
        far = abs(first / (rest[h] + first) - own[h] * inverse)
        change[h] = zero if scores[i * heads + h] == -infinity else far
        share[h] *= inverse
        bound[h] = abs(share[h] - last_share[h]) * t.before_sizes[i * heads + h]
    for j in range(i + 1):
        p, before, size = shifted(weights, j * heads), shifted(last, j * heads), shifted(t.value_sizes, j * heads)
        for h in range(low, high):
            p[h] *= zero if total[h] == zero else one / total[h]
            bound[h] += abs(p[h] - before[h]) * size[h]
    for j in range(i + 1, R):
        p = shifted(weights, j * heads)
        for h in range(low, high):
            p[h] = zero


@fast
def _compare(c: Any, t: Any, g: int, s: int, m: int, parity: int) -> None:
    """Outputs at the iterate of one parity, and how far the map moves them; NaN has been noticed before, in bounds."""
    d, padded, heads, f = c[DIM], c[PADDED], c[HEADS], t.numbers
    shared, values = heads // c[GROUPS], shifted(t.values, (g * (c[BLOCK] + R) + s) * padded)
    for h in range(g * shared, (g + 1) * shared):
        p = shifted(t.four, h * R)
        for i in range(m):
            last, new = (parity * R + i) * heads, ((1 - parity) * R + i) * heads
            y, a = shifted(t.iterates, (h * R + i) * d), shifted(t.inputs, (h * 2 * R + i) * d)
            for j in range(R):
                p[j] = t.weights[last * R + j * heads + h]
            share = t.shares[last + h]
            combine(y, share, a, p, values, padded, d)
            for j in range(R):
                p[j] = t.weights[new * R + j * heads + h] - p[j]
            t.errors[i * heads + h], t.sizes[i * heads + h] = moved(
                y, t.shares[new + h] - share, a, p, values, padded, d, f[ZERO]
            )


@exact
def _within(c: Any, t: Any, m: int, other: int) -> int:
    """1 if all rows are within tolerance as far as bounds tell, 0 if not, -1 if one is lost."""
    heads, f = c[HEADS], t.numbers
    verdict = 1
    for i in range(m):
        error, size = f[ZERO], f[ZERO]
        for h in range(heads):
            one = t.bounds[(other * R + i) * heads + h]
            if not one < f[INFINITY]:
                return -1
            error, size = max(error, one), max(size, t.before_sizes[i * heads + h])
        if not error <= f[ATOL] + f[RTOL] * size:
            verdict = 0
    return verdict


@exact
def _settled(c: Any, t: Any, b: int, s: int, m: int, write: bool) -> int:
    """1 if all rows are within tolerance, 0 if not, -1 if one is lost; `write`: record their residuals."""
    heads, f = c[HEADS], t.numbers
    verdict = 1
    for i in range(m):
        error, size = f[ZERO], f[ZERO]
        for h in range(heads):
            one = t.errors[i * heads + h]
            if not one < f[INFINITY]:
                return -1
            error, size = max(error, one), max(size, t.sizes[i * heads + h])
        if not error <= f[ATOL] + f[RTOL] * size:
            verdict = 0
        if write:
            row = b * c[LENGTH] + c[FIRST] + s + i
            t.residual[row], t.size[row] = error, size
    return verdict


@exact
def _worst(c: Any, t: Any, m: int, other: int) -> Any:
    worst = t.numbers[ZERO]
    for i in range(m):
        for h in range(c[HEADS]):
            worst = max(worst, t.bounds[(other * R + i) * c[HEADS] + h])
    return worst


@exact
def _write(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """Hand over the iterate at which the map was evaluated, its queries and log-sum-exp."""
    d, padded, heads, width, f = c[DIM], c[PADDED], c[HEADS], c[WIDTH], t.numbers
    shared, n = heads // c[GROUPS], c[STOP] - c[FIRST]
    for i in range(m):
        row, q = c[FIRST] + s + i, shifted(t.queries, (g * R + i) * padded)
        at = (b * c[LENGTH] + row) * c[GROUPS] + g
        copy(shifted(t.query, at * d), q, d)
        if c[INVERSE] != 0:
            t.inverse[at] = t.norms[g * R + i]
        column = shifted(t.columns, g * d * width + s + i)
        for k in range(d):
            column[k * width] = q[k]
        for h in range(g * shared, (g + 1) * shared):
            y = shifted(t.y, ((b * c[LENGTH] + row) * heads + h) * d)
            copy(shifted(t.before_y, ((b * n + s + i) * heads + h) * d), y, d)
            copy(y, shifted(t.iterates, (h * R + i) * d), d)
            at = (b * heads + h) * c[LENGTH] + row
            t.before_lse[(b * heads + h) * n + s + i] = t.lse[at]
            total = t.lse_parts[(R + i) * heads + h]
            t.lse[at] = -f[INFINITY] if total == f[ZERO] else t.lse_parts[i * heads + h] + math.log(total)


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
        for i in range(m):
            _weigh(c, t, low * shared, high * shared, i, parity)
        _wait(c)
        verdict = _within(c, t, m, 1 - parity)
        if verdict < 0:
            break
        if verdict == 1 or sweep >= PATIENCE:
            for g in range(low, high):
                _compare(c, t, g, s, m, parity)
            _wait(c)
            verdict = _settled(c, t, b, s, m, False)
        worst = _worst(c, t, m, 1 - parity)
        slow = slow or (sweep >= PATIENCE and worst > t.numbers[SLOW] * before)
        before = worst
        if c[GIVEN] == 0 and (verdict == 1 or slow or sweep == 0):
            if leads:
                t.verdict[0] = repair(c, t, b, s, m, 1 - parity, slow and verdict == 0)
            _wait(c)
            if verdict == 1 or slow:
                verdict = min(verdict, int(t.verdict[0]))
        if verdict != 0:
            break
    if verdict < 1:
        return False
    for g in range(low, high):
        _write(c, t, b, g, s, m)
    if leads:
        _settled(c, t, b, s, m, True)
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
        t = tensors(c, f, thread)
        for b in range(thread, c[BATCH], c[COUNT]):
            status[b] = _sample(c, t, b, 0, c[GROUPS], True, sweeps)
    else:
        t = tensors(c, f, 0)
        low, high = c[GROUPS] * thread // c[TEAM], c[GROUPS] * (thread + 1) // c[TEAM]
        for b in range(c[BATCH]):
            done = _sample(c, t, b, low, high, thread == 0, sweeps)
            _wait(c)
            if thread == 0:
                status[b] = done


def _kernels(stamp: str) -> tuple[Any, Any]:
    @kernel
    def forward32(c: Any) -> None:
        if stamp:
            _block(c, float32_at(c[NUMBERS]))

    @kernel
    def forward64(c: Any) -> None:
        if stamp:
            _block(c, float64_at(c[NUMBERS]))

    return forward32, forward64


forward32, forward64 = _kernels(STAMP)
