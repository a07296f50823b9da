"""Rows whose own weight is far from that at y = v: their own equations, within a sweep of the forward kernel."""

import math
from typing import Any

import numpy as np

from implicit_attention.causal.numba.layout import (
    DIM,
    EPS,
    FIRST,
    GROUPS,
    HEADS,
    INFINITY,
    INVERSE,
    INVERSE_DIM,
    NEAR,
    ONE,
    PADDED,
    SAME_ROOT,
    SCALE,
    STOP,
    STRICT,
    STRICT_B,
    STRICT_H,
    TURN,
    TURN_B,
    TURN_HALF,
    ZERO,
    R,
)
from implicit_attention.causal.numba.machine import exact, fast, shifted
from implicit_attention.causal.numba.roots import solve
from implicit_attention.causal.numba.vectors import add, copy, dot, fill, mix, unturn


@fast
def own_bias(c: Any, t: Any, b: int, h: int, i: int) -> Any:
    """The bias of a row's score on itself."""
    if c[STRICT] == 0:
        return t.numbers[ZERO]
    n = c[STOP] - c[FIRST]
    return t.strict[b * c[STRICT_B] + h * c[STRICT_H] + i * n + i]


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
        copy(q, shifted(t.fixed, (g * R + i) * padded), d)
        for h in range(heads):
            rest, total = t.lse_parts[(2 * R + i) * heads + h], t.lse_parts[(R + i) * heads + h]
            scale = f[ZERO] if rest == f[ZERO] else total / rest
            others = shifted(q, (1 + h) * padded)
            fill(others, d, f[ZERO])
            add(others, d, shifted(made, (i * heads + h) * padded), scale * t.shares[(other * R + i) * heads + h])
            for j in range(i):
                weight = scale * t.weights[((other * R + i) * R + j) * heads + h]
                add(others, d, shifted(made, ((R + j) * heads + h) * padded), weight)
            add(q, d, others, f[ONE])
            mix(others, d, -f[ONE], shifted(made, ((R + i) * heads + h) * padded), f[ONE])
        if normed:
            for h in range(heads + 1):
                for j in range(h + 1):
                    square = dot(shifted(q, h * padded), shifted(q, j * padded), d, f[ZERO]) * f[INVERSE_DIM]
                    gram[g, h, j] = square
                    gram[g, j, h] = square
            gram[g, 0, 0] += f[EPS]
        for h in range(g * shared, (g + 1) * shared):
            key = shifted(t.base, (1 + heads) * padded)
            copy(key, shifted(t.keys, (h * R + i) * d), d)
            if c[TURN] != 0:
                cos = shifted(t.turn, b * c[TURN_B] + (c[FIRST] + s + i) * (d // 2))
                unturn(key, cos, shifted(cos, c[TURN_HALF]), d // 2)
            alpha[h] = dot(key, q, d, f[ZERO]) * f[SCALE]
            for j in range(heads):
                beta[h, j] = dot(key, shifted(q, (1 + j) * padded), d, f[ZERO]) * f[SCALE]
            rest = t.lse_parts[(2 * R + i) * heads + h]
            own = own_bias(c, t, b, h, s + i)
            if own == -f[INFINITY]:
                offset[h] = -math.inf
            else:
                offset[h] = math.inf if rest == f[ZERO] else own - t.lse_parts[i * heads + h] - math.log(rest)
    return solve(alpha, beta, offset, gram, p)


@fast
def _move(c: Any, t: Any, i: int, other: int, p: Any) -> None:
    """Give a row of the next iterate the own weights `p`."""
    heads, f = c[HEADS], t.numbers
    for h in range(heads):
        rest, total = t.lse_parts[(2 * R + i) * heads + h], t.lse_parts[(R + i) * heads + h]
        if rest == f[ZERO]:
            continue
        scale = f[ONE] * (1.0 - p[h]) * total / rest
        weights = shifted(t.weights, (other * R + i) * R * heads + h)
        for j in range(i):
            weights[j * heads] *= scale
        weights[i * heads] = p[h]
        t.shares[(other * R + i) * heads + h] *= scale


@exact
def repair(c: Any, t: Any, b: int, s: int, m: int, other: int, all_rows: bool) -> int:
    """Put all rows, or those whose own weight is far from that at y = v, at the roots of their own equations.

    Returns:
        1 if all were there, 0 if not, -1 if one cannot be solved.
    """
    verdict, heads, p = 1, c[HEADS], np.empty(c[HEADS])
    for i in range(m):
        far = all_rows
        for h in range(heads):
            far = far or not t.changes[i * heads + h] <= t.numbers[NEAR]
        if not far:
            continue
        if not _own_root(c, t, b, s, i, other, p):
            return -1
        moved = 0.0
        for h in range(heads):
            moved = max(moved, abs(p[h] - t.weights[((other * R + i) * R + i) * heads + h]))
        if all_rows or moved > t.numbers[SAME_ROOT]:
            _move(c, t, i, other, p)
            if moved > t.numbers[SAME_ROOT]:
                verdict = 0
    return verdict
