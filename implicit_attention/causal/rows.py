"""Solving the row problems of a causal equilibrium: which root, found how, with what certainty."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from implicit_attention.causal.curve import BRISK, CAREFUL, Pace, follow_curve
from implicit_attention.causal.row_problem import RowProblem, gains

__all__ = ["RowProblem", "RowSolution", "gains", "solve_rows"]

_Found = tuple[Tensor, Tensor]  # p [R, H] and its residual [R], inf where a method refuses its own result
_Method = Callable[[RowProblem, float], _Found]
_HARDLY = 1e-2  # nats by which scores may have changed since, and distance the root may have moved, to keep a branch
_NEWTON_STEPS, _DAMPED_STEPS, _BRACKET_STEPS = 8, 20, 100
_PLAIN_STEPS = 32
_LENGTHS = (1.0, 0.5, 0.25)
_LOST = 16.0  # rounding of scores, in units of what residuals are wanted to be, beyond which no curve is followed
_LEAST = 32.0  # units of rounding below which no residual is wanted
_FINE = 1e-12  # residual up to which problems in lower precision are solved in float64


@dataclass(frozen=True)
class RowSolution:
    """Weights on the own column and how well they solve the problem.

    Attributes:
        p: `[R, H]`.
        residual: `max_h |sigmoid(score(p) + offset) - p|`, `[R]`.
        solved: Whether that is within tolerance, `[R]`.
        exact: Whether that is as small as rounding lets it be, where it is not within tolerance, `[R]`.
    """

    p: Tensor
    residual: Tensor
    solved: Tensor
    exact: Tensor


def solve_rows(
    problem: RowProblem, tolerance: float, near: Tensor | None = None, *, thorough: bool = True
) -> RowSolution:
    r"""Solve every row for the root that is reached from p = 1, the start `y = v` of plain iteration.

    One head with a linear score: the largest root. Otherwise the first of these that there is:

    1. The root that plain (Picard's) iteration `p <- target(p)` from p = 1 contracts to: its second and third steps are
       each at most half as long (in the largest component) as the one before, or within tolerance, and Newton's
       iteration, which takes over there, stays within the length of the third step, as contraction by half would.
    2. The root of damped Newton from p = 1: a step, clamped to the unit cube, is taken at the first of the lengths
       1, 1/2, 1/4 at which the residual falls by at least a quarter of the length; at most 20 steps.
    3. The first arrival at t = 1 of the curve `p = (1 - t) 1 + t target(p)` from t = 0, p = 1.

    Rows whose scores are so large (thousands of nats in float32) that rounding alone moves the target far beyond the
    tolerance are not worth 3, which takes the longest by far. In its place they get what plain iteration from p = 1
    settles at within 32 steps, usually weights of exactly 0 and 1; other rows come back unsolved.

    So which root comes back depends on the row alone; rows that 1 leaves unsolved are solved in float64 whatever
    their dtype. On random rows the roots of 1 and 3 were the same wherever both exist; those of 2 may differ.

    Args:
        problem: R problems, float32 or float64.
        tolerance: On the residual.
        near: Roots `[R, H]` of problems that have hardly changed since, NaN in rows that have none: such a row keeps
            its branch if its scores changed by less than 0.01 and Newton's iteration arrives within 0.01, at a residual
            within tolerance or rounding. Not needed, nor used, for one head with a linear score.
        thorough: Whether to go as far as 2 and 3, which take the longest; otherwise rows that need them are left
            unsolved.

    Returns:
        The solution; a row that is not solved says so.

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
    """Solve what is left in float64."""
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
        some = rows.nonzero()[:, 0]
        if len(some):
            done[some] = _improve((done[some], rest[some]), hard.rows(some), aim, methods)[0]
    p[left] = done.to(p.dtype)
    residual[left] = _size(hard.target(p[left].double()) - p[left]).to(p.dtype)
    return p, residual


def _improve(found: _Found, problem: RowProblem, tolerance: float, methods: list[_Method]) -> _Found:
    """Give the rows that are left to one method after the other; keep what is better."""
    p, residual = found
    for method in methods:
        left = (~(residual <= tolerance)).nonzero()[:, 0]
        part = problem.rows(left)
        if p.dtype == torch.float64 and len(left):  # rows as good as rounding allows have no further to go
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
    """Newton from roots of nearby problems, as far as they are nearby."""
    target, slope = problem.evaluate(near)
    room = torch.maximum(target * (1.0 - target), near * (1.0 - near))  # d p / d score
    close = ((target - near).abs() <= _HARDLY * room + 4.0 * torch.finfo(near.dtype).eps).all(-1)
    return _newton(problem, tolerance, near, torch.where(close, _HARDLY, -1.0), (target, slope))


def _settle(problem: RowProblem, tolerance: float) -> _Found:
    """Three of Picard's steps, and Newton's where they contract."""
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
    """Newton's iteration, kept in the unit cube; refused beyond `reach` [R] of the start, not tried if that is < 0."""
    p, (target, slope) = start, value  # what the problem evaluates to at the start
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
    """Newton from p = 1, each step at the first length at which the residual falls enough."""
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
    """The homotopy curve's root."""
    p = follow_curve(problem, pace).clamp(0.0, 1.0)
    return p, _size(problem.target(p) - p).nan_to_num(torch.inf)


def _largest_root(problem: RowProblem, tolerance: float) -> _Found:
    """One head, linear score: Newton in a bracket that holds the largest root and no other, in float64."""
    wide = problem.double()
    beta, c = wide.beta[:, 0, 0], (wide.alpha + wide.offset)[:, 0]
    low, high = torch.zeros_like(c), torch.ones_like(c)
    bent = (beta > 4.0) & torch.isfinite(c)  # then sigmoid(c + beta p) - p falls, rises and falls again: its turns
    if bool(bent.any()):
        steep = beta.clamp_min(4.0)  # are where the sigmoid's slope is 1 / beta
        turn = 2.0 * torch.atanh((1.0 - 4.0 / steep).sqrt())
        peak = (turn - c) / steep  # where it turns last
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
        trusted = (step >= low) & (step <= high) & (size <= 0.5 * before)  # otherwise the bracket is halved
        p, before = torch.where(going, torch.where(trusted, step, 0.5 * (low + high)), p), size
    root = p[:, None].to(problem.alpha.dtype)
    return root, _size(wide.target(root.double()) - root).to(root.dtype)
