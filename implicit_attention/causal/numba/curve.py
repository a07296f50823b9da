"""The curve from p = 1 to a root of one row's own equation, compiled: `curve.follow_curve`, one row at a time."""

import math
from typing import Any

import numpy as np

from implicit_attention.causal import curve
from implicit_attention.causal.numba.elimination import factor, substitute
from implicit_attention.causal.numba.equation import evaluate, newton_step, scores
from implicit_attention.causal.numba.machine import exact

PACES = tuple((p.nats, p.cosine, p.contraction, p.longest, float(p.steps)) for p in (curve.BRISK, curve.CAREFUL))
_FIRST_STEP, _SHORTEST_STEP = curve.FIRST_STEP, curve.SHORTEST_STEP
_LANDING_STEPS, _ARRIVED, _NEAR_ENOUGH = curve.LANDING_STEPS, curve.ARRIVED, curve.NEAR_ENOUGH


@exact
def follow_curve(alpha: Any, beta: Any, offset: Any, gram: Any, p: Any, pace: Any) -> bool:
    """Follow the curve from p = 1 to its first arrival at t = 1; put the root there into `p`.

    Args:
        alpha: `[H]`, as in `RowProblem`.
        beta: `[H, H]`.
        offset: `[H]`.
        gram: `[G, H + 1, H + 1]`; G = 0 for linear scores.
        p: `[H]`.
        pace: As in `curve.Pace`.

    Returns:
        Whether there is one.
    """
    n = len(p)
    state, trial, length = np.empty((3, n + 1)), np.empty((3, n + 1)), _FIRST_STEP
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    p[:] = 1.0
    evaluate(alpha, beta, offset, gram, p, target, weight, slope)
    square = 1.0
    for i in range(n):
        state[0, i], state[1, i] = 1.0, target[i] - 1.0
        square += state[1, i] * state[1, i]
    state[0, n], state[1, n] = 0.0, 1.0
    state[1] /= math.sqrt(square)
    state[2] = 0.0
    for _ in range(int(pace[4])):
        doubt, norm, same = _step(alpha, beta, offset, gram, state, trial, length, pace)
        good = doubt <= 1.0 and same and not _peaks(state, trial, length * norm)
        factor_ = min(max(1.0 / math.sqrt(2.0 * doubt), 0.25), 2.0)
        length = min(length * (factor_ if good else min(factor_, 0.5)), pace[3])
        if good:
            if trial[0, n] >= 1.0:
                return _land(alpha, beta, offset, gram, state[0], trial[0], p, pace)
            state[:] = trial
        if not length > _SHORTEST_STEP:
            return False
    return False


@exact
def _peaks(state: Any, trial: Any, length: float) -> bool:
    """Whether t turns back within the step and may have passed 1 before: where its tangents cross."""
    n = state.shape[1] - 1
    rise, fall = state[1, n], trial[1, n]
    if not (rise > 0.0 and fall < 0.0):
        return False
    before, after = state[0, n], trial[0, n]
    crossing: bool = before + rise * (after - before - fall * length) / (rise - fall) >= 1.0
    return crossing


@exact
def _land(alpha: Any, beta: Any, offset: Any, gram: Any, before: Any, after: Any, p: Any, pace: Any) -> bool:
    """Newton at t = 1, from where the last step crossed it; False where it wanders off the step."""
    n = len(p)
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    start, step, off = np.empty(n), np.empty(n), np.empty(n)
    share, moved, sign, span = (1.0 - before[n]) / (after[n] - before[n]), math.inf, 0.0, 0.0
    for i in range(n + 1):
        span = max(span, abs(after[i] - before[i]))
    for i in range(n):
        start[i] = before[i] + share * (after[i] - before[i])
    p[:] = start
    for _ in range(_LANDING_STEPS):
        evaluate(alpha, beta, offset, gram, p, target, weight, slope)
        sign = newton_step(target, weight, slope, p, step)
        moved = 0.0
        for i in range(n):
            p[i] += step[i]
            moved = abs(step[i]) if not abs(step[i]) <= moved else moved
        if not moved > _ARRIVED:
            break
    wandered, changed = 0.0, 0.0
    scores(alpha, beta, gram, start, off)
    scores(alpha, beta, gram, p, step)
    for i in range(n):
        wandered, changed = max(wandered, abs(p[i] - start[i])), max(changed, abs(step[i] - off[i]))
        p[i] = min(max(p[i], 0.0), 1.0)
    return moved <= _NEAR_ENOUGH and wandered <= span and changed <= 4.0 * pace[0] and sign > 0.0


@exact
def _step(
    alpha: Any, beta: Any, offset: Any, gram: Any, state: Any, trial: Any, length: float, pace: Any
) -> tuple[float, float, bool]:
    """A step along the curve, from `state` to `trial`, both `[3, H + 1]`: (p, t), tangent, half the curvature.

    Returns:
        How doubtful the step is (more than 1: not to be taken), the inverse of the cosine between the tangents, and
        whether the curve is still the same.
    """
    n = len(alpha)
    nats, cosine, contraction = pace[0], pace[1], pace[2]
    target, weight, slope = np.empty(n), np.empty(n), np.empty((n, n))
    matrix, pivots = np.empty((n + 1, n + 1)), np.empty(n + 1, dtype=np.int64)
    first, second, turn = np.empty(n + 1), np.empty(n + 1), np.empty(n + 1)
    u, tangent = trial[0], trial[1]
    for i in range(n + 1):
        u[i] = state[0, i] + length * (state[1, i] + length * state[2, i])
    evaluate(alpha, beta, offset, gram, u[:n], target, weight, slope)
    for i in range(n):
        for j in range(n):
            matrix[i, j] = (1.0 if i == j else 0.0) - u[n] * weight[i] * slope[i, j]
        matrix[i, n] = 1.0 - target[i]
        first[i] = u[i] + u[n] * (1.0 - target[i]) - 1.0
        tangent[i] = 0.0
    matrix[n] = state[1]
    first[n], tangent[n] = 0.0, 1.0
    sign = factor(matrix, pivots)
    substitute(matrix, pivots, first)
    substitute(matrix, pivots, tangent)
    off = 0.0
    for i in range(n):
        change = 0.0
        for j in range(n):
            change += slope[i, j] * first[j]
        off = abs(change) if not abs(change) <= off else off
    for i in range(n + 1):
        u[i] -= first[i]
    evaluate(alpha, beta, offset, gram, u[:n], target, weight, slope)
    for i in range(n):
        missing, change = 1.0 - target[i], 0.0
        for j in range(n):
            change += slope[i, j] * tangent[j]
        second[i] = u[i] + u[n] * missing - 1.0
        turn[i] = tangent[i] + missing * tangent[n] - u[n] * weight[i] * change
    second[n], turn[n] = 0.0, 0.0
    substitute(matrix, pivots, second)
    substitute(matrix, pivots, turn)
    square, largest_first, largest_second = 0.0, 0.0, 0.0
    for i in range(n + 1):
        u[i] -= second[i]
        tangent[i] -= turn[i]
        square += tangent[i] * tangent[i]
        largest_first, largest_second = max(largest_first, abs(first[i])), max(largest_second, abs(second[i]))
    norm = math.sqrt(square)
    for i in range(n + 1):
        tangent[i] /= norm
        trial[2, i] = (tangent[i] - state[1, i]) / (2.0 * length)
    bent = (norm - 1.0) / (1.0 / cosine - 1.0)
    shrunk = largest_second / (largest_first + 1e-9) / contraction
    doubt = max(off / nats, max(bent, shrunk))
    if not off + bent + shrunk < math.inf:  # NaN too
        doubt = math.inf
    return doubt, norm, sign > 0.0
