"""The solver of the row problems of a causal equilibrium: which root it returns, and by which methods."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from implicit_attention.causal.curve import BRISK, CAREFUL, Pace, follow_curve
from implicit_attention.causal.row_problem import RowProblem, gains

__all__ = ["RowProblem", "RowSolution", "gains", "solve_rows"]

_Found = tuple[Tensor, Tensor]  # p [R, H] and its residual [R], inf in rows whose result the method refuses
_Method = Callable[[RowProblem, float], _Found]
# A root of a nearby problem is reused if scores changed by at most this (in nats) and the root moves at most this far.
# Larger: fewer problems are solved from p = 1. Smaller: less risk to stay on a branch that p = 1 no longer leads to.
_HARDLY = 1e-2
# Newton doubles its digits: from 0.1, 5 steps reach float64. Rows that need more than 20 damped steps go to the curve.
# The bracket halves at worst: 100 halvings exhaust float64.
_NEWTON_STEPS, _DAMPED_STEPS, _BRACKET_STEPS = 8, 20, 100
_PLAIN_STEPS = 32  # of plain iteration, for rows too large for a curve: weights of 0 and 1 settle in a few
_LENGTHS = (1.0, 0.5, 0.25)  # of a damped step; rows that need shorter ones go to the curve
_LOST = 16.0  # rounding of scores, in units of what residuals are wanted to be, beyond which no curve is followed
_LEAST = 32.0  # units of rounding below which no residual is wanted
_FINE = 1e-12  # tolerance of rows in lower precision that are solved in float64: far below their own rounding


@dataclass(frozen=True)
class RowSolution:
    """Weights on the own column, and their residuals.

    Attributes:
        p: Weights, `[R, H]`.
        residual: `max_h |sigmoid(score(p) + offset) - p|`, `[R]`.
        solved: Whether the residual is within tolerance, `[R]`.
        exact: Whether the residual is above tolerance, but as small as rounding allows, `[R]`.
    """

    p: Tensor
    residual: Tensor
    solved: Tensor
    exact: Tensor


def solve_rows(
    problem: RowProblem, tolerance: float, near: Tensor | None = None, *, thorough: bool = True
) -> RowSolution:
    r"""Solve every row for the root that is reached from p = 1, the start `y = v` of plain iteration.

    One head with a linear score: the largest root. Otherwise the first of these roots that exists:

    1. The root to which Picard's iteration `p <- target(p)` from p = 1 contracts. Its second and third steps must each
       be at most half as long (in the largest component) as the step before, or within tolerance. Newton's iteration
       continues from there. It must stay within the length of the third step, as a contraction by half would.
    2. The root of damped Newton from p = 1. A step is clamped to the unit cube and taken at the first of the lengths
       1, 1/2, 1/4 at which the residual falls by at least a quarter of the length; at most 20 steps.
    3. The first arrival at t = 1 of the curve `p = (1 - t) 1 + t target(p)` from t = 0, p = 1.

    Rounding alone moves the target of a row with huge scores (thousands of nats in float32) far beyond the tolerance.
    Method 3 takes the longest by far and is not worth it there. Such rows get what plain iteration from p = 1 settles
    at within 32 steps, usually weights of exactly 0 and 1. The others come back unsolved.

    So the returned root depends on the row alone. Rows that method 1 does not solve are solved in float64, for any
    dtype. On random rows methods 1 and 3 returned the same root if both found one; method 2 may return another root.

    Args:
        problem: R problems, float32 or float64.
        tolerance: Tolerance of the residual.
        near: Roots `[R, H]` of problems that have hardly changed since; NaN in rows without one. A row keeps its branch
            if its scores changed by less than 0.01 and Newton's iteration arrives within 0.01, at a residual within
            tolerance or rounding. One head with a linear score does not need it and ignores it.
        thorough: Whether to try methods 2 and 3, which take the longest. If false, rows that need them stay unsolved.

    Returns:
        The solution, with `solved` false in rows that were not solved.

    Reference:
        S. Chow, J. Mallet-Paret and J. Yorke, "Finding zeroes of maps: homotopy methods that are constructive with
        probability one", Math. Comp. 32 (1978).
    """
    with torch.no_grad():
        if near is None or (problem.alpha.shape[-1] == 1 and problem.gram is None):
            p, residual = _anew(problem, tolerance, thorough)
        else:
            p, residual = _continue(problem, tolerance, near)
            left = (~((residual <= tolerance) | (residual <= problem.rounding(p)))).nonzero()[:, 0]
            if len(left):
                q, rest = _anew(problem.rows(left), tolerance, thorough)
                better = ~(residual[left] <= rest)
                p[left[better]], residual[left[better]] = q[better], rest[better]
        p = torch.where(problem.offset.isinf(), problem.offset.sigmoid(), p)  # 0 or 1, without rounding
        return RowSolution(p, residual, residual <= tolerance, residual <= problem.rounding(p))


def _anew(problem: RowProblem, tolerance: float, thorough: bool) -> _Found:
    """Solve rows of which nothing is known."""
    linear_alone = problem.alpha.shape[-1] == 1 and problem.gram is None
    found = (_largest_root if linear_alone else _settle)(problem, tolerance)
    return _finish(found, problem, tolerance) if thorough else found


def _finish(found: _Found, problem: RowProblem, tolerance: float) -> _Found:
    """Solve the rows that are left, in float64."""
    p, residual = found
    left = (~(residual <= tolerance)).nonzero()[:, 0]
    if not len(left):
        return found
    part = problem.rows(left)
    hard, aim = part.double(), tolerance if p.dtype == torch.float64 else _FINE
    known = (p[left], residual[left]) if p.dtype == torch.float64 else _settle(hard, aim)
    done, rest = _improve(known, hard, aim, [_damped_newton])
    eps = torch.finfo(p.dtype).eps
    worth = part.size() * (0.25 * eps) <= _LOST * max(tolerance, _LEAST * eps)
    curves: list[_Method] = [partial(_curve, pace=BRISK), partial(_curve, pace=CAREFUL)]
    plain: list[_Method] = [_iterate]
    for rows, methods in ((worth, curves), (~worth, plain)):
        some = rows.nonzero()[:, 0].to(done.device)
        if len(some):
            done[some] = _improve((done[some], rest[some]), hard.rows(some), aim, methods)[0]
    rounded = done.to(p.dtype)  # `hard` may be on another device than p
    p[left] = rounded.to(p.device)
    residual[left] = _size(hard.target(rounded.double()) - rounded).to(p)
    return p, residual


def _improve(found: _Found, problem: RowProblem, tolerance: float, methods: list[_Method]) -> _Found:
    """Try the methods in turn on the rows that are left; keep the result with the smaller residual."""
    p, residual = found
    for method in methods:
        left = (~(residual <= tolerance)).nonzero()[:, 0]
        part = problem.rows(left)
        if p.dtype == torch.float64 and len(left):  # rows at the level of rounding cannot be improved
            able = ~(residual[left] <= part.rounding(p[left]))
            left, part = left[able], part.rows(able)
        if not len(left):
            break
        q, rest = method(part, tolerance)
        better = ~(residual[left] <= rest)
        p[left[better]], residual[left[better]] = q[better], rest[better]
    return p, residual


def _size(step: Tensor) -> Tensor:
    return step.abs().amax(-1)


def _continue(problem: RowProblem, tolerance: float, near: Tensor) -> _Found:
    """Newton from roots of nearby problems, in rows whose scores have hardly changed."""
    target, slope = problem.evaluate(near)
    room = torch.maximum(target * (1.0 - target), near * (1.0 - near))  # d p / d score: turns nats into weights
    close = ((target - near).abs() <= _HARDLY * room + 4.0 * torch.finfo(near.dtype).eps).all(-1)
    return _newton(problem, tolerance, near, torch.where(close, _HARDLY, -1.0), (target, slope))


def _settle(problem: RowProblem, tolerance: float) -> _Found:
    """Three Picard steps, then Newton in rows where they contract."""
    steps = [torch.ones_like(problem.alpha)]
    for _ in range(3):
        steps.append(problem.target(steps[-1]))
    path = torch.stack(steps)
    length = (path[1:] - path[:-1]).abs().amax(-1)  # [3, R]
    contracts = (length[1:] <= (0.5 * length[:-1]).clamp_min(tolerance)).all(0)
    reach = torch.where(contracts, length[-1].clamp_min(tolerance), -1.0)
    return _newton(problem, tolerance, steps[-1], reach, problem.evaluate(steps[-1]))


def _newton(
    problem: RowProblem, tolerance: float, start: Tensor, reach: Tensor, value: tuple[Tensor, Callable[[], Tensor]]
) -> _Found:
    """Newton's iteration in the unit cube; refused beyond `reach` [R] of the start, and not tried for `reach` < 0."""
    p, (target, slope) = start, value  # the problem evaluated at the start
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    inside = reach >= 0.0
    for step in range(_NEWTON_STEPS + 1):
        residual = _size(target - p)
        going = inside & ~(residual <= tolerance)
        if step == _NEWTON_STEPS or not bool(going.any()):
            break
        jacobian = (target * (1.0 - target))[..., None] * slope()
        change = torch.linalg.solve_ex(eye - jacobian, (target - p)[..., None])[0][..., 0]
        p = torch.where(going[:, None], (p + change).clamp(0.0, 1.0), p)
        inside = _size(p - start) <= reach
        target, slope = problem.evaluate(p)
    return p.clone() if p is start else p, residual.masked_fill(~inside, torch.inf)


def _damped_newton(problem: RowProblem, tolerance: float) -> _Found:
    """Newton from p = 1; each step takes the first length at which the residual falls enough."""
    p = torch.ones_like(problem.alpha)
    residual = _size(problem.target(p) - p).nan_to_num(torch.inf)
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    index = (residual > tolerance).nonzero()[:, 0]
    problem = problem.rows(index)
    for _ in range(_DAMPED_STEPS):
        if not len(index):
            break
        at, size = p[index], residual[index]
        target, jacobian = problem.linearize(at)
        change = torch.linalg.solve_ex(eye - jacobian, (target - at)[..., None])[0][..., 0]
        for length in _LENGTHS:
            trial = (at + length * change).clamp(0.0, 1.0)
            rest = _size(problem.target(trial) - trial)
            good = (size == residual[index]) & (rest <= (1.0 - 0.25 * length) * size)
            p[index[good]], residual[index[good]] = trial[good], rest[good]
            if bool((residual[index] < size).all()):
                break
        going = (residual[index] < size) & (residual[index] > tolerance)
        index, problem = index[going], problem.rows(going)
    return p, residual


def _iterate(problem: RowProblem, tolerance: float) -> _Found:
    """Plain iteration from p = 1."""
    p = torch.ones_like(problem.alpha)
    for _ in range(_PLAIN_STEPS):
        p = problem.target(p)
    return p, _size(problem.target(p) - p).nan_to_num(torch.inf)


def _curve(problem: RowProblem, tolerance: float, pace: Pace) -> _Found:
    """The root at the end of the homotopy curve."""
    p = follow_curve(problem, pace).clamp(0.0, 1.0)
    return p, _size(problem.target(p) - p).nan_to_num(torch.inf)


def _largest_root(problem: RowProblem, tolerance: float) -> _Found:
    """One head, linear score: Newton in a bracket that holds only the largest root, in float64."""
    wide = problem.double()
    beta, c = wide.beta[:, 0, 0], (wide.alpha + wide.offset)[:, 0]
    low, high = torch.zeros_like(c), torch.ones_like(c)
    # For beta > 4, sigmoid(c + beta p) - p falls, rises and falls again: up to three roots. It turns where the slope of
    # the sigmoid is 1 / beta. If it is positive at its last turn, the peak, the largest root is beyond the peak;
    # otherwise the only root is before the first turn.
    bent = (beta > 4.0) & torch.isfinite(c)
    if bool(bent.any()):
        steep = beta.clamp_min(4.0)
        turn = 2.0 * torch.atanh((1.0 - 4.0 / steep).sqrt())
        peak = (turn - c) / steep
        above = bent & (peak > 0.0) & (peak < 1.0) & (torch.sigmoid(turn) >= peak)
        low = torch.where(above, peak, low)
        high = torch.where(bent & ~above & (peak > 0.0), ((-turn - c) / steep).clamp(0.0, 1.0), high)
    size_of_terms = beta.abs() + c.abs().masked_fill(c.isinf(), 0.0)
    rounding = 0.25 * torch.finfo(c.dtype).eps * (4.0 + size_of_terms)
    aim = rounding.clamp_min(0.1 * tolerance)
    p, before = high, torch.full_like(high, torch.inf)
    for _ in range(_BRACKET_STEPS):
        value = torch.sigmoid(torch.addcmul(c, beta, p))
        excess = value - p
        size = excess.abs()
        going = size > aim
        if not bool(going.any()):
            break
        low, high = torch.where(excess > 0.0, p, low), torch.where(excess < 0.0, p, high)
        step = p - excess / (value * (1.0 - value) * beta - 1.0)
        trusted = (step >= low) & (step <= high) & (size <= 0.5 * before)  # otherwise halve the bracket
        p, before = torch.where(going, torch.where(trusted, step, 0.5 * (low + high)), p), size
    root = p[:, None].to(problem.alpha.dtype)
    return root.to(problem.alpha.device), _size(wide.target(root.double()) - root).to(problem.alpha)
