"""The own equation of one row, compiled: `rows.solve_rows` without the curve, in float64."""

import math
from typing import Any

import numpy as np

from implicit_attention.native.machine import exact

NEWTON_STEPS, DAMPED_STEPS, FINE = 8, 20, 1e-12


@exact
def evaluate(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any, target: Any, slope: Any) -> float:
    """Put `sigmoid(score(p) + offset)` and its Jacobian into `target` and `slope`; return the residual."""
    heads, groups = len(p), len(gram)
    half = np.empty(heads + 1)
    worst = 0.0
    for h in range(heads):
        top = alpha[h]
        for j in range(heads):
            top += beta[h, j] * p[j]
        inverse = 1.0
        if groups > 0:
            of = gram[h // (heads // groups)]
            square = 0.0
            for i in range(heads + 1):
                half[i] = of[i, 0]
                for j in range(heads):
                    half[i] += of[i, j + 1] * p[j]
                square += half[i] * (1.0 if i == 0 else p[i - 1])
            inverse = 1.0 / math.sqrt(square)
        score = top * inverse
        z = score + offset[h]
        e = math.exp(-abs(z))
        target[h] = (1.0 if z >= 0.0 else e) / (1.0 + e)
        for j in range(heads):
            change = beta[h, j]
            if groups > 0:
                change = (change - score * inverse * half[j + 1]) * inverse
            slope[h, j] = e / ((1.0 + e) * (1.0 + e)) * change
        off = abs(target[h] - p[h])
        worst = off if not off <= worst else worst
    return worst


@exact
def _newton_step(target: Any, slope: Any, p: Any, step: Any) -> None:
    """Solve `(I - slope) step = target - p` by elimination with pivots; slope is overwritten."""
    n = len(p)
    for i in range(n):
        for j in range(n):
            slope[i, j] = (1.0 if i == j else 0.0) - slope[i, j]
        step[i] = target[i] - p[i]
    for k in range(n):
        best = k
        for i in range(k + 1, n):
            if abs(slope[i, k]) > abs(slope[best, k]):
                best = i
        if best != k:
            for j in range(n):
                slope[k, j], slope[best, j] = slope[best, j], slope[k, j]
            step[k], step[best] = step[best], step[k]
        if slope[k, k] == 0.0:
            step[k] = math.nan
            continue
        for i in range(k + 1, n):
            factor = slope[i, k] / slope[k, k]
            for j in range(k + 1, n):
                slope[i, j] -= factor * slope[k, j]
            step[i] -= factor * step[k]
    for k in range(n - 1, -1, -1):
        for j in range(k + 1, n):
            step[k] -= slope[k, j] * step[j]
        step[k] /= slope[k, k]


@exact
def _settle(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> bool:
    """Three of Picard's steps from p = 1, and Newton's where they contract."""
    n = len(p)
    target, slope, step, start = np.empty(n), np.empty((n, n)), np.empty(n), np.empty(n)
    p[:] = 1.0
    before = math.inf
    for t in range(3):
        length = evaluate(alpha, beta, offset, gram, p, target, slope)
        if t > 0 and not length <= max(0.5 * before, FINE):
            return False
        before = length
        p[:] = target
    start[:] = p
    for _ in range(NEWTON_STEPS):
        if evaluate(alpha, beta, offset, gram, p, target, slope) <= FINE:
            return True
        _newton_step(target, slope, p, step)
        for h in range(n):
            p[h] = min(max(p[h] + step[h], 0.0), 1.0)
            if not abs(p[h] - start[h]) <= max(before, FINE):
                return False
    return evaluate(alpha, beta, offset, gram, p, target, slope) <= FINE


@exact
def _damped(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> bool:
    """Newton from p = 1, each step at the first length at which the residual falls enough."""
    n = len(p)
    target, slope, step, trial = np.empty(n), np.empty((n, n)), np.empty(n), np.empty(n)
    p[:] = 1.0
    size = evaluate(alpha, beta, offset, gram, p, target, slope)
    for _ in range(DAMPED_STEPS):
        if size <= FINE:
            return True
        _newton_step(target, slope, p, step)
        length, fell = 1.0, False
        for _ in range(3):
            for h in range(n):
                trial[h] = min(max(p[h] + length * step[h], 0.0), 1.0)
            rest = evaluate(alpha, beta, offset, gram, trial, target, slope)
            if rest <= (1.0 - 0.25 * length) * size:
                p[:] = trial
                size, fell = rest, True
                break
            length *= 0.5
        if not fell:
            return False
    return size <= FINE


@exact
def solve(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> bool:
    """Put the root that is wanted into `p`; False if it takes more than Newton's method to find.

    Args:
        alpha: `[H]`, as in `RowProblem`.
        beta: `[H, H]`.
        offset: `[H]`.
        gram: `[G, H + 1, H + 1]`; G = 0 for linear scores.
        p: `[H]`.

    Returns:
        Whether the row is solved.
    """
    if _settle(alpha, beta, offset, gram, p):
        return True
    return (len(p) > 1 or len(gram) > 0) and _damped(alpha, beta, offset, gram, p)
