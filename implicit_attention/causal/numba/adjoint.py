"""The compiled adjoint of one diagonal block; `README.md` beside this file derives it.

Rows are solved four at a time, from the last to the first. A sweep that changes the queries' cotangents by so little
that `|J^T delta| <= |delta| max_c |Omega_Q[:, c]|` is within tolerance needs no product with Omega_Q to show it.
"""

import math
from typing import Any

from implicit_attention.causal.numba.adjoint_layout import (
    BARRIER,
    BATCH,
    BLOCK,
    COUNT,
    DIM,
    FIRST,
    GIVEN,
    GRAD_B,
    GRAD_H,
    GRAD_N,
    GROUPS,
    HEADS,
    INFINITY,
    KEY_B,
    KEY_H,
    KEY_N,
    LENGTH,
    NORM,
    NUMBERS,
    ONE,
    PADDED,
    SCALE,
    STATUS,
    STOP,
    STRICT,
    STRICT_B,
    STRICT_H,
    SWEEPS,
    TEAM,
    THREAD,
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
from implicit_attention.causal.numba.adjoint_own import (
    ascend,
    before_map,
    correct,
    couple,
    invert,
    project,
    through_map,
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
    tile4,
)
from implicit_attention.causal.numba.vectors import add, copy, dot, fill, largest_difference

MOST_SWEEPS = 24
STALLED = 0.5  # ratio of residuals at which only rounding is left


@exact
def larger(a: Any, b: Any) -> Any:
    """The larger of two; NaN if one is."""
    return a if a > b or a != a else b


@fast
def _take(c: Any, t: Any, b: int, g: int) -> None:
    """Copy a group's keys, scaled, and queries into padded rows, keys also transposed."""
    n, d, padded, width, f = c[STOP] - c[FIRST], c[DIM], c[PADDED], c[WIDTH], t.numbers
    rows, shared = c[BLOCK] + R, c[HEADS] // c[GROUPS]
    for j in range(n):
        q = shifted(t.queries, (g * rows + j) * padded)
        copy(q, shifted(t.query, ((b * c[LENGTH] + c[FIRST] + j) * c[GROUPS] + g) * d), d)
        fill(shifted(q, d), padded - d, f[ZERO])
    for h in range(g * shared, (g + 1) * shared):
        columns = shifted(t.keys_t, h * d * width)
        for j in range(n):
            key = shifted(t.keys, (h * rows + j) * padded)
            source = shifted(t.key, b * c[KEY_B] + h * c[KEY_H] + (c[FIRST] + j) * c[KEY_N])
            for k in range(d):
                key[k] = source[k] * f[SCALE]
                columns[k * width + j] = key[k]
            fill(shifted(key, d), padded - d, f[ZERO])


@fast
def _bias(c: Any, t: Any, b: int, h: int, i: int, j: int) -> Any:
    if c[STRICT] == 0:
        return t.numbers[ZERO]
    return t.strict[b * c[STRICT_B] + h * c[STRICT_H] + i * (c[STOP] - c[FIRST]) + j]


@fast
def _seen(c: Any, t: Any, b: int, h: int, i: int) -> Any:
    """The row's log-sum-exp; 0 where it sees nothing."""
    lse = t.lse[(b * c[HEADS] + h) * c[LENGTH] + c[FIRST] + i]
    return t.numbers[ZERO] if lse == -t.numbers[INFINITY] else lse


@fast
def _attended_later(c: Any, t: Any, b: int, g: int, h: int, s: int) -> None:
    """Weights and slopes of the rows from `s + R` on, which are solved, on the columns `s .. s + R`."""
    n, d, width, f, first = c[STOP] - c[FIRST], c[DIM], c[WIDTH], t.numbers, s + R
    rows = c[BLOCK] + R
    weights, slopes = shifted(t.weights, h * R * width), shifted(t.slopes, (h * rows + s) * width)
    q = shifted(t.query, ((b * c[LENGTH] + c[FIRST] + s) * c[GROUPS] + g) * d)
    v = shifted(t.value, b * c[VALUE_B] + g * c[VALUE_G] + (c[FIRST] + s) * c[VALUE_N])
    for i in range(first - first % c[VECTOR], n, c[VECTOR]):
        keys, lams = shifted(t.keys_t, h * d * width + i), shifted(t.lams_t, h * d * width + i)
        tile4(shifted(weights, i), width, q, c[GROUPS] * d, 1, keys, width, d)
        tile4(shifted(slopes, i), width, v, c[VALUE_N], 1, lams, width, d)
    lse = shifted(t.lse, (b * c[HEADS] + h) * c[LENGTH] + c[FIRST])
    along = shifted(t.along, h * rows)
    for j in range(R):
        p, slope = shifted(weights, j * width), shifted(slopes, j * width)
        if c[STRICT] != 0:
            for i in range(first, n):
                p[i] += _bias(c, t, b, h, i, s + j)
        for i in range(first, n):
            off = f[ZERO] if lse[i] == -f[INFINITY] else lse[i]
            p[i] = exp_of(p[i] - off)
            slope[i] = p[i] * (slope[i] - along[i])


@fast
def _start(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """What later rows give the queries; the rows' weights on each other; lam = grad."""
    n, d, padded, width, heads, f = c[STOP] - c[FIRST], c[DIM], c[PADDED], c[WIDTH], c[HEADS], t.numbers
    rows, shared, first = c[BLOCK] + R, heads // c[GROUPS], s + m
    for j in range(R):
        total = shifted(t.from_later, (g * R + j) * padded)
        fill(total, padded, f[ZERO])
        if j < m:
            copy(total, shifted(t.later, ((b * c[LENGTH] + c[FIRST] + s + j) * c[GROUPS] + g) * d), d)
    for h in range(g * shared, (g + 1) * shared):
        if first < n:
            _attended_later(c, t, b, g, h, s)
            out, keys = shifted(t.out, h * R * padded), shifted(t.keys, (h * rows + first) * padded)
            slopes = shifted(t.slopes, (h * rows + s) * width + first)
            for k in range(0, padded, c[VECTOR]):
                tile4(shifted(out, k), padded, slopes, width, 1, shifted(keys, k), padded, n - first)
            for j in range(m):
                add(shifted(t.from_later, (g * R + j) * padded), d, shifted(out, j * padded), f[ONE])
        for i in range(m):
            key, seen = shifted(t.keys, (h * rows + s + i) * padded), _seen(c, t, b, h, s + i)
            for j in range(i + 1):
                score = dot(key, shifted(t.queries, (g * rows + s + j) * padded), d, f[ZERO])
                if j == i and c[GIVEN] != 0:
                    score = t.given[(b * heads + h) * c[LENGTH] + c[FIRST] + s + i]
                t.pairs[(h * R + i) * R + j] = exp_of(score + _bias(c, t, b, h, s + i, s + j) - seen)
            now = shifted(t.now, (h * R + i) * padded)
            copy(now, shifted(t.grad, b * c[GRAD_B] + (c[FIRST] + s + i) * c[GRAD_N] + h * c[GRAD_H]), d)


@fast
def _pull(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """From the rows' lam to the cotangent of what Omega_Q made; how far that moved."""
    d, padded, width, heads, f = c[DIM], c[PADDED], c[WIDTH], c[HEADS], t.numbers
    rows, shared, size = c[BLOCK] + R, heads // c[GROUPS], c[GROUPS] * d
    for h in range(g * shared, (g + 1) * shared):
        for i in range(m):
            now = shifted(t.now, (h * R + i) * padded)
            y = shifted(t.y, ((b * c[LENGTH] + c[FIRST] + s + i) * heads + h) * d)
            along = dot(now, y, d, f[ZERO])
            t.along[h * rows + s + i] = along
            for j in range(i + 1):
                v = shifted(t.value, b * c[VALUE_B] + g * c[VALUE_G] + (c[FIRST] + s + j) * c[VALUE_N])
                slope = t.pairs[(h * R + i) * R + j] * (dot(now, v, d, f[ZERO]) - along)
                t.slopes[(h * rows + s + j) * width + s + i] = slope
    for j in range(m):
        after, before = shifted(t.after, j * size + g * d), shifted(t.before, j * size + g * d)
        copy(before, after, d)
        copy(after, shifted(t.from_later, (g * R + j) * padded), d)
        for h in range(g * shared, (g + 1) * shared):
            for i in range(j if c[GIVEN] == 0 else j + 1, m):
                slope = t.slopes[(h * rows + s + j) * width + s + i]
                add(after, d, shifted(t.keys, (h * rows + s + i) * padded), slope)
        before_map(c, t, b, g, s, j, after)
        moved_row = f[ZERO]
        for k in range(d):
            moved_row += (after[k] - before[k]) * (after[k] - before[k])
        t.moves[g * R + j] = moved_row
    for j in range(m, R):
        fill(shifted(t.after, j * size + g * d), d, f[ZERO])


@fast
def _push(c: Any, t: Any, b: int, h: int, s: int, m: int) -> None:
    """`grad + Omega_Q^T ...`, into `out`; how far that is from lam."""
    d, padded, f, size = c[DIM], c[PADDED], t.numbers, c[GROUPS] * c[DIM]
    out = shifted(t.out, h * R * padded)
    if c[WEIGHT] == 0:
        for j in range(m):
            copy(shifted(out, j * padded), shifted(t.after, j * size), d)
    else:
        through_map(c, out, t.after, size, shifted(t.weight, h * size * padded), size)
    worst = f[ZERO]
    for j in range(m):
        row = shifted(out, j * padded)
        add(row, d, shifted(t.grad, b * c[GRAD_B] + (c[FIRST] + s + j) * c[GRAD_N] + h * c[GRAD_H]), f[ONE])
        worst = larger(worst, largest_difference(row, shifted(t.now, (h * R + j) * padded), d))
    t.errors[h] = worst


@exact
def _bound(c: Any, t: Any, m: int) -> Any:
    """At most the residual, by Cauchy and Schwarz."""
    worst = t.numbers[ZERO]
    for j in range(m):
        total = t.numbers[ZERO]
        for g in range(c[GROUPS]):
            total += t.moves[g * R + j]
        worst = total if not total <= worst else worst
    return t.numbers[NORM] * math.sqrt(worst)


@exact
def _wait(c: Any) -> None:
    if c[TEAM] > 1:
        call(c[BARRIER])


@exact
def _error(c: Any, t: Any) -> Any:
    error = t.numbers[ZERO]
    for h in range(c[HEADS]):
        error = larger(error, t.errors[h])
    return error


@exact
def _slow(c: Any, t: Any, allowed: Any, error: Any, before: Any) -> bool:
    """Whether four more sweeps at this pace do not do; about so many does it take to solve for the own columns."""
    pace = error / before
    return c[GIVEN] == 0 and pace * pace * pace * pace * error > allowed


@exact
def _prepare_own(c: Any, t: Any, b: int, low: int, high: int, s: int, m: int, leads: bool) -> None:
    shared = c[HEADS] // c[GROUPS]
    for g in range(low, high):
        ascend(c, t, b, g, s, m)
    _wait(c)
    for h in range(low * shared, high * shared):
        couple(c, t, h, m)
    _wait(c)
    if leads:
        invert(c, t, b, s, m)


@exact
def _correct(c: Any, t: Any, low: int, high: int, m: int) -> None:
    shared = c[HEADS] // c[GROUPS]
    for h in range(low * shared, high * shared):
        project(c, t, h, m)
    _wait(c)
    for g in range(low, high):
        correct(c, t, g, m)


@exact
def _solve_rows(c: Any, t: Any, b: int, low: int, high: int, s: int, m: int, leads: bool) -> tuple[int, Any]:
    """Solve a few rows; return the sweeps (0: not solved) and the residual."""
    padded, heads, infinity = c[PADDED], c[HEADS], t.numbers[INFINITY]
    shared, allowed = heads // c[GROUPS], t.allowed[b]
    for g in range(low, high):
        _start(c, t, b, g, s, m)
    _wait(c)
    corrections, before = 0, infinity
    for sweep in range(1, MOST_SWEEPS + 1):
        for g in range(low, high):
            _pull(c, t, b, g, s, m)
        _wait(c)
        if sweep > 1:
            bound = _bound(c, t, m)
            if bound <= allowed:
                return sweep, bound
        for h in range(low * shared, high * shared):
            _push(c, t, b, h, s, m)
        _wait(c)
        error = _error(c, t)
        if error <= allowed:
            return sweep, error
        if not error < infinity:
            break
        if corrections > R and not error < STALLED * before:
            return sweep, error  # rounding, and no way to do better
        if corrections == 0 and sweep > 1 and _slow(c, t, allowed, error, before):
            _prepare_own(c, t, b, low, high, s, m, leads)
            corrections = 1
        if corrections > 0:
            corrections += 1
            _correct(c, t, low, high, m)
        else:
            for h in range(low * shared, high * shared):
                copy(shifted(t.now, h * R * padded), shifted(t.out, h * R * padded), m * padded)
        before = error
    return 0, infinity


@fast
def _finish(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """Hand over lam and the gradients of the rows' values; keep what earlier rows need."""
    n, d, padded, width, heads, f = c[STOP] - c[FIRST], c[DIM], c[PADDED], c[WIDTH], c[HEADS], t.numbers
    rows, shared, size = c[BLOCK] + R, heads // c[GROUPS], c[GROUPS] * d
    for j in range(m):
        at = (b * n + s + j) * size + g * d
        copy(shifted(t.made, at), shifted(t.after, j * size + g * d), d)
        fill(shifted(t.d_value, ((b * c[GROUPS] + g) * n + s + j) * d), d, f[ZERO])
    for h in range(g * shared, (g + 1) * shared):
        columns = shifted(t.lams_t, h * d * width + s)
        for i in range(m):
            now, kept = shifted(t.now, (h * R + i) * padded), shifted(t.lams, (h * rows + s + i) * padded)
            copy(kept, now, d)
            fill(shifted(kept, d), padded - d, f[ZERO])
            copy(shifted(t.lam, ((b * n + s + i) * heads + h) * d), now, d)
            for k in range(d):
                columns[k * width + i] = now[k]
            t.own[(b * heads + h) * n + s + i] = t.slopes[(h * rows + s + i) * width + s + i]
            for j in range(m):
                t.weights[(h * R + j) * width + s + i] = t.pairs[(h * R + i) * R + j] if j <= i else f[ZERO]
                if j > i or (j == i and c[GIVEN] != 0):
                    t.slopes[(h * rows + s + j) * width + s + i] = f[ZERO]
        out, weights = shifted(t.out, h * R * padded), shifted(t.weights, h * R * width + s)
        lams = shifted(t.lams, (h * rows + s) * padded)
        for k in range(0, padded, c[VECTOR]):
            tile4(shifted(out, k), padded, weights, width, 1, shifted(lams, k), padded, n - s)
        for j in range(m):
            at = ((b * c[GROUPS] + g) * n + s + j) * d
            add(shifted(t.d_value, at), d, shifted(out, j * padded), f[ONE])


@fast
def _key_gradients(c: Any, t: Any, b: int, g: int, h: int) -> None:
    n, d, padded, width, heads, f = c[STOP] - c[FIRST], c[DIM], c[PADDED], c[WIDTH], c[HEADS], t.numbers
    rows = c[BLOCK] + R
    out = shifted(t.out, h * R * padded)
    for s in range(0, n, R):
        m = min(R, n - s)
        slopes, queries = shifted(t.slopes, h * rows * width + s), shifted(t.queries, g * rows * padded)
        for k in range(0, padded, c[VECTOR]):
            tile4(shifted(out, k), padded, slopes, 1, width, shifted(queries, k), padded, s + m)
        for i in range(m):
            d_key, row = shifted(t.d_key, ((b * heads + h) * n + s + i) * d), shifted(out, i * padded)
            for k in range(d):
                d_key[k] = row[k] * f[SCALE]


@exact
def _sample(c: Any, t: Any, b: int, low: int, high: int, leads: bool, sweeps: Any) -> bool:
    """Solve a sample's rows; whether all are."""
    n, shared = c[STOP] - c[FIRST], c[HEADS] // c[GROUPS]
    worst, most = t.numbers[ZERO], 0
    for g in range(low, high):
        _take(c, t, b, g)
    for s in range((n - 1) // R * R, -1, -R):
        m = min(R, n - s)
        count, residual = _solve_rows(c, t, b, low, high, s, m, leads)
        if count == 0:
            return False
        worst, most = max(worst, residual), max(most, count)
        for g in range(low, high):
            _finish(c, t, b, g, s, m)
    for g in range(low, high):
        for h in range(g * shared, (g + 1) * shared):
            _key_gradients(c, t, b, g, h)
    if leads:
        t.residual[b], sweeps[b] = worst, most
    return True


@exact
def _block(c: Any, f: Any) -> None:
    """This thread's part of the block: some samples, or some groups of all samples."""
    thread = call(c[THREAD]) if c[COUNT] > 1 else 0
    sweeps, status = pointer_like(c, c[SWEEPS]), pointer_like(c, c[STATUS])
    if c[TEAM] == 1:
        t = tensors(c, f, thread)
        for b in range(thread, c[BATCH], c[COUNT]):
            status[b] = 1 if _sample(c, t, b, 0, c[GROUPS], True, sweeps) else 0
    else:
        t = tensors(c, f, 0)
        low, high = c[GROUPS] * thread // c[TEAM], c[GROUPS] * (thread + 1) // c[TEAM]
        for b in range(c[BATCH]):
            done = _sample(c, t, b, low, high, thread == 0, sweeps)
            _wait(c)
            if thread == 0:
                status[b] = 1 if done else 0


def _kernels(stamp: str) -> tuple[Any, Any]:
    @kernel
    def adjoint32(c: Any) -> None:
        if stamp:
            _block(c, float32_at(c[NUMBERS]))

    @kernel
    def adjoint64(c: Any) -> None:
        if stamp:
            _block(c, float64_at(c[NUMBERS]))

    return adjoint32, adjoint64


adjoint32, adjoint64 = _kernels(STAMP)
