"""The own equation of one row, compiled, in float64: as `row_problem` has it."""

import math
from typing import Any

import numpy as np

from implicit_attention.causal.numba.elimination import factor, substitute
from implicit_attention.causal.numba.machine import exact

EPS = 2.0**-52


@exact
def evaluate(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any, target: Any, weight: Any, slope: Any) -> float:
    """Evaluate the equation.

    Args:
        alpha: `[H]`, as in `RowProblem`.
        beta: `[H, H]`.
        offset: `[H]`.
        gram: `[G, H + 1, H + 1]`; G = 0 for linear scores.
        p: `[H]`.
        target: Filled with `sigmoid(score(p) + offset)`, `[H]`.
        weight: Filled with the sigmoid's slope, `[H]`.
        slope: Filled with the scores' Jacobian, `[H, H]`.

    Returns:
        The residual.
    """
    heads, groups = len(p), len(gram)
    half = np.empty(heads + 1)
    worst = 0.0
    for h in range(heads):
        top = alpha[h]
        for j in range(heads):
            top += beta[h, j] * p[j]
        inverse = 1.0
        if groups > 0:
            if h % (heads // groups) == 0:
                _multiply(gram[h // (heads // groups)], p, half)
            inverse = 1.0 / math.sqrt(_along(half, p))
        score = top * inverse
        z = score + offset[h]
        e = math.exp(-abs(z))
        target[h] = (1.0 if z >= 0.0 else e) / (1.0 + e)
        weight[h] = e / ((1.0 + e) * (1.0 + e))
        for j in range(heads):
            change = beta[h, j]
            if groups > 0:
                change = (change - score * inverse * half[j + 1]) * inverse
            slope[h, j] = change
        off = abs(target[h] - p[h])
        worst = off if not off <= worst else worst
    return worst


@exact
def _multiply(matrix: Any, p: Any, out: Any) -> None:
    """`out = matrix (1, p)`."""
    for i in range(len(out)):
        out[i] = matrix[i, 0]
        for j in range(len(p)):
            out[i] += matrix[i, j + 1] * p[j]


@exact
def _along(half: Any, p: Any) -> float:
    """`half . (1, p)`."""
    total = half[0]
    for i in range(len(p)):
        total += half[i + 1] * p[i]
    return total


@exact
def scores(alpha: Any, beta: Any, gram: Any, p: Any, out: Any) -> None:
    """Fill `out` with the scores at `p`, both `[H]`."""
    heads, groups = len(p), len(gram)
    half = np.empty(heads + 1)
    for h in range(heads):
        out[h] = alpha[h]
        for j in range(heads):
            out[h] += beta[h, j] * p[j]
        if groups > 0:
            _multiply(gram[h // (heads // groups)], p, half)
            out[h] /= math.sqrt(_along(half, p))


@exact
def rounding(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> float:
    """How far rounding alone may move the target at `p`, as in `RowProblem.rounding`."""
    heads, groups = len(p), len(gram)
    target, weight, slope = np.empty(heads), np.empty(heads), np.empty((heads, heads))
    evaluate(alpha, beta, offset, gram, p, target, weight, slope)
    half, modulus = np.empty(heads + 1), np.empty(heads + 1)
    worst = 0.0
    for h in range(heads):
        size, top = abs(alpha[h]), alpha[h]
        for j in range(heads):
            size += abs(beta[h, j]) * p[j]
            top += beta[h, j] * p[j]
        if groups > 0:
            of = gram[h // (heads // groups)]
            _multiply(of, p, half)
            _multiply(np.abs(of), p, modulus)
            square = _along(half, p)
            inverse = 1.0 / math.sqrt(square)
            size = size * inverse + 0.5 * abs(top) * inverse * _along(modulus, p) / square
        if not math.isinf(offset[h]):
            size += abs(offset[h])
        worst = max(worst, size * weight[h])
    return EPS * (1.0 + worst)


@exact
def newton_step(target: Any, weight: Any, slope: Any, p: Any, step: Any) -> float:
    """Solve `(I - Jacobian) step = target - p`; slope is overwritten. Returns the determinant's sign."""
    n = len(p)
    pivots = np.empty(n, dtype=np.int64)
    for i in range(n):
        for j in range(n):
            slope[i, j] = (1.0 if i == j else 0.0) - weight[i] * slope[i, j]
        step[i] = target[i] - p[i]
    sign = factor(slope, pivots)
    substitute(slope, pivots, step)
    return sign
