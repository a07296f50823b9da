"""The row problem of a causal equilibrium: how much each token attends to itself.

Once everything a row attends to before itself is known, its output is `y_h = (1 - p_h) a_h + p_h v_h` per head,
and the weights p solve H equations, `p = sigmoid(score(p) + offset)`. Heads mix through the query map, so the
equations are coupled; all rows are solved at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NEWTON_STEPS = 20
_CURVE_STEPS = 4000
_CORRECTOR_STEPS = 6
_FIRST_STEP, _SHORTEST_STEP = 0.05, 1e-10
_PACES = ((0.2, 0.95), (0.05, 0.99))  # longest step and least cosine between tangents: brisk, then careful


@dataclass(frozen=True)
class RowProblem:
    r"""R problems `p = sigmoid(score(p) + offset)` in H unknowns each.

    The score is linear, `alpha + beta p`, or with normed queries `(alpha + beta p) / rms(p)`, where
    `rms(p)^2 = (1, p)^T gram (1, p)`.

    Attributes:
        alpha: `[R, H]`.
        beta: `[R, H, H]`; row h holds the derivatives of head h's score (its numerator).
        offset: `[R, H]`: bias of the token's own column minus the log-normaliser of the others. `-inf` where a
            token does not see itself (p = 0), `+inf` where it sees nothing else (p = 1).
        gram: `[R, H, H + 1, H + 1]`, symmetric, or None for linear scores.
    """

    alpha: Tensor
    beta: Tensor
    offset: Tensor
    gram: Tensor | None = None

    def score(self, p: Tensor) -> Tensor:
        """Return the scores at `p`, `[R, H]`."""
        return self._score(p)[0]

    def target(self, p: Tensor) -> Tensor:
        """Return `sigmoid(score(p) + offset)`, `[R, H]`."""
        return torch.sigmoid(self._score(p)[0] + self.offset)

    def linearize(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target `[R, H]` and its Jacobian `[R, H, H]` at `p`."""
        score, slope = self._score(p, slope=True)
        target = torch.sigmoid(score + self.offset)
        return target, (target * (1.0 - target))[..., None] * slope

    def _score(self, p: Tensor, *, slope: bool = False) -> tuple[Tensor, Tensor]:
        top = self.alpha + torch.einsum("rhg,rg->rh", self.beta, p)
        if self.gram is None:
            return top, self.beta
        one_p = torch.cat([torch.ones_like(p[:, :1]), p], -1)
        half = torch.einsum("rhij,rj->rhi", self.gram, one_p)
        inverse = torch.rsqrt(torch.einsum("rhi,ri->rh", half, one_p))
        score = top * inverse
        if not slope:
            return score, self.beta
        return score, (self.beta - (score * inverse)[..., None] * half[..., 1:]) * inverse[..., None]

    def rows(self, index: Tensor) -> "RowProblem":
        """Return the problems of some rows, by mask or index."""
        gram = None if self.gram is None else self.gram[index]
        return RowProblem(self.alpha[index], self.beta[index], self.offset[index], gram)

    def double(self) -> "RowProblem":
        """Return the problems in float64."""
        gram = None if self.gram is None else self.gram.double()
        return RowProblem(self.alpha.double(), self.beta.double(), self.offset.double(), gram)


@dataclass(frozen=True)
class RowSolution:
    """Weights on the own column and how well they solve the problem.

    Attributes:
        p: `[R, H]`.
        residual: `max_h |sigmoid(score(p) + offset) - p|`, `[R]`.
        solved: Whether that is within tolerance, `[R]`.
    """

    p: Tensor
    residual: Tensor
    solved: Tensor


def solve_rows(problem: RowProblem, tolerance: float, near: Tensor | None = None) -> RowSolution:
    """Solve every row for the root that is reached from p = 1, the start `y = v`.

    One head with a linear score: the largest root, by Newton's method in a bracket that holds no other. Several
    heads, or normed queries: Newton's method from p = 1 with a line search; rows that it leaves unsolved follow
    the curve `p = (1 - t) 1 + t sigmoid(score(p) + offset)` from t = 0, p = 1 to t = 1. Which root comes back
    depends on the row alone.

    Args:
        problem: The problems.
        tolerance: On the residual.
        near: Roots `[R, H]` of a problem that has hardly changed since, NaN where there is none.

    Returns:
        The solution; a row that is not solved says so.

    Reference:
        Chow, Mallet-Paret and Yorke, "Finding zeroes of maps: homotopy methods that are constructive with
        probability one", Math. Comp. 32 (1978).
    """
    solver = RowSolver(tolerance)
    solver._root = near
    return solver.solve(problem)


class RowSolver:
    """`solve_rows` for a sequence of problems that settles: it remembers the roots that were hard to reach.

    A row that needed the curve, and whose problem has hardly changed since, starts from its last root.
    """

    _HARDLY = 1e-2  # change of the scores at the root, in nats

    def __init__(self, tolerance: float) -> None:
        """Start without memory.

        Args:
            tolerance: On the residual.
        """
        self.tolerance = tolerance
        self._root: Tensor | None = None  # [R, H], NaN where the curve was not needed

    def solve(self, problem: RowProblem, *, thorough: bool = True) -> RowSolution:
        """Solve every row; see `solve_rows`.

        Args:
            problem: The problems.
            thorough: Whether to follow the curve for rows that Newton's method does not solve from p = 1.

        Returns:
            The solution, in which rows may be unsolved.
        """
        if problem.alpha.shape[-1] == 1 and problem.gram is None:
            return _judge(problem, _bracketed(problem, self.tolerance), self.tolerance)
        found = _judge(problem, _newton(problem, torch.ones_like(problem.alpha), self.tolerance), self.tolerance)
        left = (~found.solved).nonzero()[:, 0]
        if not thorough or not len(left):
            return found
        p = found.p.clone()
        left = self._continue(problem, p, left)
        hard = problem.rows(left).double()
        for longest, straightest in _PACES:
            if not len(left):
                break
            arrived = follow_curve(hard, longest, straightest)
            lost = arrived.isnan().any(-1)
            p[left[~lost]] = arrived[~lost].to(p.dtype)
            hard, left = hard.rows(lost), left[lost]
        self._root = torch.where(found.solved[:, None], torch.nan, p)
        return _judge(problem, p, self.tolerance)

    def _continue(self, problem: RowProblem, p: Tensor, left: Tensor) -> Tensor:
        """Put roots that a few Newton steps reach from the last ones into `p`; return the rows still left."""
        if self._root is None:
            return left
        before, part = self._root[left], problem.rows(left)
        before = before.nan_to_num(0.5)
        near = (torch.logit(part.target(before), 1e-12) - torch.logit(before, 1e-12)).abs().amax(-1) < self._HARDLY
        after = _newton(part, torch.where(near[:, None], before, 1.0), self.tolerance)
        near &= _judge(part, after, self.tolerance).solved & ((after - before).abs().amax(-1) < self._HARDLY)
        p[left[near]] = after[near]
        return left[~near]


def _judge(problem: RowProblem, p: Tensor, tolerance: float) -> RowSolution:
    residual = (problem.target(p) - p).abs().amax(-1)
    return RowSolution(p, residual, residual <= tolerance)


def _bracketed(problem: RowProblem, tolerance: float) -> Tensor:
    """One head: Newton from the right end of a bracket that holds the largest root and no other."""
    beta = problem.beta[:, 0, 0]
    c = (problem.alpha + problem.offset)[:, 0]
    low, high = torch.zeros_like(c), torch.ones_like(c)
    # sigmoid(c + beta p) - p turns where the sigmoid's slope is 1: a minimum, then a maximum (beta > 4).
    root = torch.sqrt((1.0 - 4.0 / beta.clamp_min(4.0)).clamp_min(0.0))
    turns = torch.stack([torch.log1p(-root) - torch.log1p(root), torch.log1p(root) - torch.log1p(-root)])
    lowest, highest = (turns - c) / beta.clamp_min(4.0)
    bent = (beta > 4.0) & torch.isfinite(c)
    peak = torch.sigmoid(c + beta * highest) - highest
    above = bent & (highest > 0) & (highest < 1) & (peak >= 0)
    below = bent & ~above & (highest > 0)
    low = torch.where(above, highest, low)
    high = torch.where(below, lowest.clamp(0.0, 1.0), high)
    p, before = high, torch.full_like(high, torch.inf)
    for _ in range(100):
        value = torch.sigmoid(c + beta * p)
        excess = value - p
        if bool((excess.abs() <= 0.1 * tolerance).all()):
            break
        low, high = torch.where(excess >= 0, p, low), torch.where(excess <= 0, p, high)
        step = p - excess / (value * (1.0 - value) * beta - 1.0)
        slow = excess.abs() > 0.5 * before  # then the bracket is halved instead
        trusted = (step > low) & (step < high) & ~slow
        p, before = torch.where(trusted, step, 0.5 * (low + high)), excess.abs()
    return p[:, None]


def _newton(problem: RowProblem, p: Tensor, tolerance: float) -> Tensor:
    """Newton's method with a line search, kept in the unit cube; rows stop for themselves."""
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    live = torch.arange(len(p), device=p.device)
    part, before = problem, torch.full_like(p[:, 0], torch.inf)
    p = p.clone()
    for _ in range(_NEWTON_STEPS):
        at = p[live]
        target, slope = part.linearize(at)
        residual = target - at
        size = residual.abs().amax(-1)
        going = (size > 0.1 * tolerance) & (size < 0.99 * before)  # a row that hardly moves is stuck
        if not bool(going.all()):
            live, at, residual, size, slope = live[going], at[going], residual[going], size[going], slope[going]
            part = part.rows(going)
        if not len(live):
            break
        step = torch.linalg.solve_ex(eye - slope, residual[..., None])[0][..., 0].nan_to_num(0.0, 0.0, 0.0)
        p[live], before = _line_search(part, at, step, size), size
    return p


def _line_search(problem: RowProblem, p: Tensor, step: Tensor, size: Tensor) -> Tensor:
    best, least = p, size
    length = torch.ones_like(size)
    for _ in range(8):
        trial = (p + length[:, None] * step).clamp(0.0, 1.0)
        left = (problem.target(trial) - trial).abs().amax(-1)
        better = left < least
        best, least = torch.where(better[:, None], trial, best), torch.where(better, left, least)
        short = left > (1.0 - 1e-4 * length) * size
        if not bool(short.any()):
            break
        length = torch.where(short, 0.5 * length, length)
    return best


def follow_curve(problem: RowProblem, longest: float, straightest: float) -> Tensor:
    """Follow `p = (1 - t) + t sigmoid(score(p) + offset)` from p = 1 by pseudo-arclength; NaN where it is lost.

    Args:
        problem: The problems, float64.
        longest: Longest step along the curve.
        straightest: Least cosine between the tangents at the ends of a step; a sharper turn shortens it.

    Returns:
        `[R, H]`, polished at t = 1.
    """
    count = len(problem.alpha)
    result = torch.full_like(problem.alpha, torch.nan)
    u = torch.cat([torch.ones_like(problem.alpha), torch.zeros_like(problem.alpha[:, :1])], -1)  # (p, t)
    tangent = torch.zeros_like(u)
    tangent[:, -1] = 1.0
    length = torch.full_like(u[:, 0], _FIRST_STEP)
    index = torch.arange(count, device=u.device)
    tangent = _tangent(problem, u, tangent)
    for _ in range(_CURVE_STEPS):
        guess = u + length[:, None] * tangent
        landed, good = _correct(problem, guess, tangent, 2.5 * (1.0 - straightest) * length)
        turned = _tangent(problem, landed, tangent)
        good &= (turned * tangent).sum(-1) > straightest  # a sharper turn may have been a jump to another branch
        over = good & (landed[:, -1] >= 1.0)
        if bool(over.any()):
            done, p = _land(problem.rows(over), u[over], landed[over])
            which = over.nonzero()[:, 0]
            result[index[which[done]]] = p[done]
            good[which[~done]] = False  # too long a step: the end point was not where the curve leads
            finished = torch.zeros_like(over)
            finished[which[done]] = True
        else:
            finished = over
        u = torch.where(good[:, None], landed, u)
        tangent = torch.where(good[:, None], turned, tangent)
        length = torch.where(good, (1.5 * length).clamp_max(longest), 0.5 * length)
        keep = ~finished & (length > _SHORTEST_STEP)
        if not bool(keep.all()):
            problem, u, tangent, length, index = problem.rows(keep), u[keep], tangent[keep], length[keep], index[keep]
        if not len(index):
            break
    return result


def _curve(problem: RowProblem, u: Tensor) -> tuple[Tensor, Tensor]:
    """`h(p, t) = p - 1 + t (1 - target)` and its Jacobian `[R, H, H + 1]`."""
    p, t = u[:, :-1], u[:, -1:]
    target, slope = problem.linearize(p)
    eye = torch.eye(p.shape[-1], dtype=u.dtype, device=u.device)
    return p - 1.0 + t * (1.0 - target), torch.cat([eye - t[..., None] * slope, (1.0 - target)[..., None]], -1)


def _tangent(problem: RowProblem, u: Tensor, before: Tensor) -> Tensor:
    """The unit tangent of the curve, on the side that `before` points to."""
    _, jacobian = _curve(problem, u)
    bordered = torch.cat([jacobian, before[:, None, :]], 1)
    right = torch.zeros_like(u)
    right[:, -1] = 1.0
    solved = torch.linalg.solve_ex(bordered, right[..., None])[0][..., 0]
    return torch.nn.functional.normalize(solved.nan_to_num(0.0, 0.0, 0.0), dim=-1)


def _correct(problem: RowProblem, guess: Tensor, tangent: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Newton back to the curve in the plane across the tangent; whether it got there without going far."""
    u = guess
    moved = torch.zeros_like(reach)
    for _ in range(_CORRECTOR_STEPS):
        value, jacobian = _curve(problem, u)
        off = ((u - guess) * tangent).sum(-1, keepdim=True)
        right = torch.cat([value, off], -1)
        bordered = torch.cat([jacobian, tangent[:, None, :]], 1)
        step = torch.linalg.solve_ex(bordered, right[..., None])[0][..., 0].nan_to_num(1.0, 1.0, 1.0)
        u = u - step
        moved = torch.linalg.vector_norm(step, dim=-1)
        if bool((moved < 1e-9).all()):
            break
    far = torch.linalg.vector_norm(u - guess, dim=-1)
    return u, (moved < 1e-8) & (far <= reach)


def _land(problem: RowProblem, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Newton at t = 1 from where the last step crossed it; refused if it wanders off the step."""
    share = ((1.0 - before[:, -1]) / (after[:, -1] - before[:, -1]).clamp_min(1e-300)).clamp(0.0, 1.0)
    start = (before + share[:, None] * (after - before))[:, :-1]
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    p, moved = start, torch.full_like(share, torch.inf)
    for _ in range(12):
        target, slope = problem.linearize(p)
        step = torch.linalg.solve_ex(eye - slope, (target - p)[..., None])[0][..., 0].nan_to_num(1.0, 1.0, 1.0)
        p = p + step
        moved = torch.linalg.vector_norm(step, dim=-1)
        if bool((moved < 1e-13).all()):
            break
    span = torch.linalg.vector_norm((after - before)[:, :-1], dim=-1)
    return (moved < 1e-10) & (torch.linalg.vector_norm(p - start, dim=-1) <= span + 1e-12), p
