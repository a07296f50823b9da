"""The root of one row's own equation, compiled: `rows.solve_rows` in float64."""

import math
from typing import Any

import numpy as np

from implicit_attention.causal.numba.curve import PACES, follow_curve
from implicit_attention.causal.numba.equation import evaluate, newton_step, rounding
from implicit_attention.causal.numba.machine import exact

NEWTON_STEPS, DAMPED_STEPS, FINE = 8, 20, 1e-12


@exact
def _settle(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> float:
    """Three of Picard's steps from p = 1, and Newton's where they contract; the residual, inf where they do not."""
    n = len(p)
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    step, start = np.empty(n), np.empty(n)
    p[:] = 1.0
    before = math.inf
    for t in range(3):
        length = evaluate(alpha, beta, offset, gram, p, target, weight, slope)
        if t > 0 and not length <= max(0.5 * before, FINE):
            return math.inf
        before = length
        p[:] = target
    start[:] = p
    for _ in range(NEWTON_STEPS):
        residual = evaluate(alpha, beta, offset, gram, p, target, weight, slope)
        if residual <= FINE:
            return residual
        newton_step(target, weight, slope, p, step)
        for h in range(n):
            p[h] = min(max(p[h] + step[h], 0.0), 1.0)
            if not abs(p[h] - start[h]) <= max(before, FINE):
                return math.inf
    return evaluate(alpha, beta, offset, gram, p, target, weight, slope)


@exact
def _damped(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> float:
    """Newton from p = 1, each step at the first length at which the residual falls enough; the residual."""
    n = len(p)
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    step, trial = np.empty(n), np.empty(n)
    p[:] = 1.0
    size = evaluate(alpha, beta, offset, gram, p, target, weight, slope)
    for _ in range(DAMPED_STEPS):
        if size <= FINE:
            break
        newton_step(target, weight, slope, p, step)
        length, fell = 1.0, False
        for _ in range(3):
            for h in range(n):
                trial[h] = min(max(p[h] + length * step[h], 0.0), 1.0)
            rest = evaluate(alpha, beta, offset, gram, trial, target, weight, slope)
            if rest <= (1.0 - 0.25 * length) * size:
                p[:] = trial
                size, fell = rest, True
                break
            length *= 0.5
        if not fell:
            break
    return size


@exact
def _good(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any, residual: float) -> bool:
    """Whether it is within tolerance, or as good as rounding allows."""
    return residual <= FINE or (residual < math.inf and residual <= rounding(alpha, beta, offset, gram, p))


@exact
def solve(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any) -> bool:
    """Put the root that `rows.solve_rows` describes into `p`.

    Args:
        alpha: `[H]`, as in `RowProblem`.
        beta: `[H, H]`.
        offset: `[H]`.
        gram: `[G, H + 1, H + 1]`; G = 0 for linear scores.
        p: `[H]`.

    Returns:
        Whether the row is solved.
    """
    if _good(alpha, beta, offset, gram, p, _settle(alpha, beta, offset, gram, p)):
        return True
    one_linear = len(p) == 1 and len(gram) == 0  # then the curve leads to the largest root, which is the one wanted
    if not one_linear and _good(alpha, beta, offset, gram, p, _damped(alpha, beta, offset, gram, p)):
        return True
    n = len(p)
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    for pace in PACES:
        if follow_curve(alpha, beta, offset, gram, p, pace):
            residual = evaluate(alpha, beta, offset, gram, p, target, weight, slope)
            if _good(alpha, beta, offset, gram, p, residual):
                return True
    return False
