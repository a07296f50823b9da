"""Rows' own columns, solved for exactly within a sweep of the adjoint kernel.

The own column of a row is of rank one per head: with `u_h = p_h (v_h - y_h)` and `w_g` the gradient of the own score
of head g by the row's output, `J_own^T lam = sum_h (u_h . lam_h) w_h`. A residual r is therefore corrected by

    delta = (I - J_own^T)^-1 r = r + sum_h z_h w_h,    (I - M^T) z = (u_h . r_h),    M_gh = w_g,h . u_h

What is left couples each row to later ones alone: of R rows, after R corrections nothing is but rounding.
"""

from typing import Any

import numpy as np

from implicit_attention.causal.numba.adjoint_layout import (
    BLOCK,
    DIM,
    FIRST,
    GROUPS,
    HEADS,
    INVERSE,
    INVERSE_DIM,
    LENGTH,
    NEAR_SINGULAR,
    ONE,
    PADDED,
    STOP,
    SUSPECT,
    TURN,
    TURN_B,
    TURN_HALF,
    VALUE_B,
    VALUE_G,
    VALUE_N,
    VECTOR,
    WEIGHT,
    ZERO,
    R,
)
from implicit_attention.causal.numba.machine import exact, fast, pointer_like, shifted, tile4, tile4_wide
from implicit_attention.causal.numba.vectors import add, copy, dot, fill, unturn


@fast
def before_map(c: Any, t: Any, b: int, g: int, s: int, j: int, q: Any) -> None:
    """Turn the cotangent of the query of row `s + j` into that of the linear map's output, in place."""
    d, f, row = c[DIM], t.numbers, c[FIRST] + s + j
    if c[INVERSE] != 0:
        inverse = t.inverse[(b * c[LENGTH] + row) * c[GROUPS] + g]
        query = shifted(t.queries, (g * (c[BLOCK] + R) + s + j) * c[PADDED])
        along = dot(q, query, d, f[ZERO]) * f[INVERSE_DIM]
        for k in range(d):
            q[k] = (q[k] - along * query[k]) * inverse
    if c[TURN] != 0:
        cos = shifted(t.turn, b * c[TURN_B] + row * (d // 2))
        unturn(q, cos, shifted(cos, c[TURN_HALF]), d // 2)


@fast
def through_map(c: Any, out: Any, made: Any, size: int, weight: Any, depth: int) -> None:
    """Multiply cotangents `[R, size]` of the linear map's output with some of its rows, `[depth, padded]`."""
    padded = c[PADDED]
    wide = padded - padded % (2 * c[VECTOR])
    for k in range(0, wide, 2 * c[VECTOR]):
        tile4_wide(shifted(out, k), padded, made, size, 1, shifted(weight, k), padded, depth)
    for k in range(wide, padded, c[VECTOR]):
        tile4(shifted(out, k), padded, made, size, 1, shifted(weight, k), padded, depth)


@fast
def ascend(c: Any, t: Any, b: int, g: int, s: int, m: int) -> None:
    """The gradients of the own scores of a group's heads; how those heads' outputs move with the own weights."""
    d, padded, heads, f, rows = c[DIM], c[PADDED], c[HEADS], t.numbers, c[BLOCK] + R
    shared, size = heads // c[GROUPS], c[GROUPS] * d
    for h in range(g * shared, (g + 1) * shared):
        through, us = shifted(t.through, h * R * padded), shifted(t.u, h * R * padded)
        for j in range(m):
            row, u = shifted(through, j * padded), shifted(us, j * padded)
            copy(row, shifted(t.keys, (h * rows + s + j) * padded), d)
            before_map(c, t, b, g, s, j, row)
            at = c[FIRST] + s + j
            y = shifted(t.y, ((b * c[LENGTH] + at) * heads + h) * d)
            v = shifted(t.value, b * c[VALUE_B] + g * c[VALUE_G] + at * c[VALUE_N])
            p = t.pairs[(h * R + j) * R + j]
            for k in range(d):
                u[k] = p * (v[k] - y[k])
        fill(shifted(through, m * padded), (R - m) * padded, f[ZERO])
        for into in range(heads):
            w = shifted(t.ascent, (h * heads + into) * R * padded)
            if c[WEIGHT] == 0:
                copy(w, through, R * padded)
            else:
                weight = shifted(t.weight, (into * size + g * d) * padded)
                through_map(c, w, through, padded, weight, d)


@fast
def couple(c: Any, t: Any, h: int, m: int) -> None:
    """A head's column of M, for each row."""
    heads, padded = c[HEADS], c[PADDED]
    for j in range(m):
        u = shifted(t.u, (h * R + j) * padded)
        for g in range(heads):
            w = shifted(t.ascent, ((g * heads + h) * R + j) * padded)
            t.inverses[(j * heads + g) * heads + h] = dot(w, u, c[DIM], t.numbers[ZERO])


@exact
def _eliminate(a: Any) -> float:
    """Turn `(A, I)` into `(I, A^-1)`, by Gauss and Jordan with pivots; return the squared norm of the inverse."""
    n = len(a)
    for k in range(n):
        best = k
        for i in range(k + 1, n):
            if abs(a[i, k]) > abs(a[best, k]):
                best = i
        for j in range(2 * n):
            a[k, j], a[best, j] = a[best, j], a[k, j]
        scale = 1.0 / a[k, k]
        for j in range(2 * n):
            a[k, j] *= scale
        for i in range(n):
            factor = a[i, k]
            if i != k:
                for j in range(k, 2 * n):
                    a[i, j] -= factor * a[k, j]
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += a[i, n + j] * a[i, n + j]
    return total


@exact
def invert(c: Any, t: Any, b: int, s: int, m: int) -> None:
    """Replace M by the inverse of `I - M^T`, in float64; hand M over if one of its eigenvalues may be close to 1."""
    heads, n = c[HEADS], c[STOP] - c[FIRST]
    suspects, a = pointer_like(c, c[SUSPECT]), np.empty((heads, 2 * heads))
    for j in range(m):
        matrix = shifted(t.inverses, j * heads * heads)
        for g in range(heads):
            for h in range(heads):
                one = 1.0 if g == h else 0.0
                a[h, g] = one - matrix[g * heads + h]
                a[g, heads + h] = one
        # An eigenvalue at a distance e from 1 makes the norm of the inverse 1 / e or more.
        if not _eliminate(a) * t.numbers[NEAR_SINGULAR] * t.numbers[NEAR_SINGULAR] < 1.0:
            at = b * n + s + j
            suspects[at] = 1
            copy(shifted(t.gain, at * heads * heads), matrix, heads * heads)
        for g in range(heads):
            for h in range(heads):
                matrix[g * heads + h] = t.numbers[ONE] * a[g, heads + h]


@fast
def project(c: Any, t: Any, h: int, m: int) -> None:
    """A head's residual along u."""
    heads, padded = c[HEADS], c[PADDED]
    for j in range(m):
        at = (h * R + j) * padded
        out, now, u = shifted(t.out, at), shifted(t.now, at), shifted(t.u, at)
        total = t.numbers[ZERO]
        for k in range(c[DIM]):
            total += (out[k] - now[k]) * u[k]
        t.right[j * heads + h] = total


@fast
def correct(c: Any, t: Any, g: int, m: int) -> None:
    """Correct a group's lam, and the cotangent that lam was made from, as if it had been made from that alone."""
    d, padded, heads = c[DIM], c[PADDED], c[HEADS]
    shared, size = heads // c[GROUPS], c[GROUPS] * d
    for j in range(m):
        after, right = shifted(t.after, j * size + g * d), shifted(t.right, j * heads)
        for h in range(g * shared, (g + 1) * shared):
            copy(shifted(t.now, (h * R + j) * padded), shifted(t.out, (h * R + j) * padded), d)
        for of in range(heads):
            z = dot(shifted(t.inverses, (j * heads + of) * heads), right, heads, t.numbers[ZERO])
            for h in range(g * shared, (g + 1) * shared):
                w = shifted(t.ascent, ((of * heads + h) * R + j) * padded)
                add(shifted(t.now, (h * R + j) * padded), d, w, z)
            if of // shared == g:
                add(after, d, shifted(t.through, (of * R + j) * padded), z)
