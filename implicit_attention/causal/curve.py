"""The homotopy curve from p = 1 to a root of a row problem, for any weights.

At t = 0, `p = (1 - t) 1 + t target(p)` has one solution, p = 1. From there a smooth curve (p, t) leads, for almost
every problem, to a root at t = 1. The curve may turn back in t, so it is followed by arc length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from implicit_attention.causal.row_problem import RowProblem

_CHUNK = 2048  # rows followed at once: more rows share launch overhead, fewer take less memory
# The length is adapted from the first step on, so the first one matters little. A row that needs a shorter step than
# the second constant is given up.
FIRST_STEP, SHORTEST_STEP = 0.05, 1e-10
# Newton at t = 1: number of steps; length of a step that counts as converged; largest last step that is accepted.
LANDING_STEPS, ARRIVED, NEAR_ENOUGH = 20, 1e-13, 1e-10


@dataclass(frozen=True)
class Pace:
    """Bounds on the steps along a curve: looser bounds are faster, tighter bounds less likely to leave the curve.

    Attributes:
        nats: Largest first correction of a step, in units of the scores.
        cosine: Smallest cosine between the tangents at the two ends of a step.
        contraction: Largest ratio of the second correction to the first.
        longest: Longest step, in units of (p, t).
        steps: Number of steps after which a row is given up.
    """

    nats: float
    cosine: float
    contraction: float
    longest: float
    steps: int


# BRISK is tried first. CAREFUL takes several times its steps, and only for rows that BRISK has lost.
BRISK = Pace(nats=1.0, cosine=0.8, contraction=0.1, longest=0.5, steps=4000)
CAREFUL = Pace(nats=0.1, cosine=0.98, contraction=0.02, longest=0.1, steps=20_000)


def follow_curve(problem: RowProblem, pace: Pace) -> Tensor:
    """Follow each row's curve from p = 1 to its first arrival at t = 1, by pseudo-arclength.

    A step predicts with the tangent and the last bend, and corrects twice with one factorisation. It is accepted if the
    tangent turned little, the corrections were small and shrank, and the orientation of the curve is unchanged (the
    sign of the determinant of Jacobian and tangent, constant along a curve). Otherwise it is repeated at a shorter
    length. The steps of a row depend on that row alone.

    Args:
        problem: R problems, float64.
        pace: Bounds on the steps.

    Returns:
        Roots, `[R, H]`; NaN in rows whose curve was lost.

    Reference:
        S. Chow, J. Mallet-Paret and J. Yorke, "Finding zeroes of maps: homotopy methods that are constructive with
        probability one", Math. Comp. 32 (1978); E. Allgower and K. Georg, "Numerical Continuation Methods" (1990).
    """
    starts = range(0, max(1, len(problem.alpha)), _CHUNK)
    return torch.cat([_follow(problem.rows(slice(k, k + _CHUNK)), pace) for k in starts])


@dataclass
class _Walk:
    """The state of the rows on their curves."""

    problem: RowProblem
    index: Tensor  # [R], row of the chunk
    u: Tensor  # [R, H + 1], point (p, t)
    tangent: Tensor  # [R, H + 1], unit tangent
    bend: Tensor  # [R, H + 1], half the curvature
    length: Tensor  # [R], length of the next step

    @classmethod
    def start(cls, problem: RowProblem) -> "_Walk":
        ones = torch.ones_like(problem.alpha)
        u = torch.cat([ones, torch.zeros_like(ones[:, :1])], -1)
        tangent = torch.cat([problem.target(ones) - 1.0, ones[:, :1]], -1)
        tangent = normalize(tangent, dim=-1)
        index = torch.arange(len(u), device=u.device)
        return cls(problem, index, u, tangent, torch.zeros_like(u), torch.full_like(u[:, 0], FIRST_STEP))

    def rows(self, keep: Tensor) -> "_Walk":
        state = (self.index, self.u, self.tangent, self.bend, self.length)
        return _Walk(self.problem.rows(keep), *(t[keep] for t in state))


def _follow(problem: RowProblem, pace: Pace) -> Tensor:
    walk = _Walk.start(problem)
    crossings: list[tuple[Tensor, Tensor, Tensor]] = []
    live = torch.ones_like(walk.index, dtype=torch.bool)
    for _ in range(pace.steps):
        before = walk.u
        _step(walk, pace)
        over = live & (walk.u[:, -1] >= 1.0)
        if bool(over.any()):
            crossings.append((walk.index[over], before[over], walk.u[over]))
        live &= ~over & (walk.length > SHORTEST_STEP)
        count = int(live.sum())
        if not count:
            break
        if len(live) - count > len(live) // 8:  # dropping rows copies the others, about a step's work
            walk, live = walk.rows(live), live[live]
    roots = torch.full_like(problem.alpha, torch.nan)
    if crossings:
        index, before, after = (torch.cat(parts) for parts in zip(*crossings, strict=True))
        roots[index] = _land(problem.rows(index), before, after, pace)
    return roots


def _step(walk: _Walk, pace: Pace) -> None:
    """Try one step in every row, and accept it in rows that pass all tests."""
    length = walk.length[:, None]
    guess = torch.addcmul(torch.addcmul(walk.u, length, walk.tangent), length.square(), walk.bend)
    value, slope, weight, missing = _curve(walk.problem, guess)
    system = _bordered(slope, weight, missing, walk.tangent)
    right = guess.new_zeros(*guess.shape, 2)
    right[:, :-1, 0], right[:, -1, 1] = value, 1.0
    first, tangent = system.solve(right).unbind(-1)
    off = (slope @ first[:, :-1, None])[..., 0]
    u = guess - first
    value, slope, weight, missing = _curve(walk.problem, u)
    along = torch.addcmul(tangent[:, :-1], missing, tangent[:, -1:])
    along = torch.addcmul(along, weight, (slope @ tangent[:, :-1, None])[..., 0], value=-1.0)
    second, turn = system.solve(torch.stack([value, along], -1)).unbind(-1)
    u, tangent = u - second, tangent - turn
    norm = torch.linalg.vector_norm(tangent, dim=-1)  # 1 / cosine: the product with the old tangent is 1
    tangent = tangent / norm[:, None]
    shrunk = _largest(second) / (_largest(first) + 1e-9)
    bent = (norm - 1.0) / (1.0 / pace.cosine - 1.0)
    doubt = torch.stack([_largest(off) / pace.nats, bent, shrunk / pace.contraction]).amax(0).nan_to_num(torch.inf)
    good = (doubt <= 1.0) & system.positive() & ~_peaks(walk, u, tangent, walk.length * norm)
    taken = good[:, None]
    walk.bend = torch.where(taken, (tangent - walk.tangent) / (2.0 * length), walk.bend)
    walk.u, walk.tangent = torch.where(taken, u, walk.u), torch.where(taken, tangent, walk.tangent)
    # If doubt grows with the square of the length, the next step has a doubt of 1/2.
    factor = torch.rsqrt(2.0 * doubt).clamp(0.25, 2.0)
    walk.length = (walk.length * torch.where(good, factor, factor.clamp_max(0.5))).clamp_max(pace.longest)


def _largest(t: Tensor) -> Tensor:
    return t.abs().amax(-1)


def _peaks(walk: _Walk, u: Tensor, tangent: Tensor, length: Tensor) -> Tensor:
    """Whether t turns back within the step to `u` and may have passed 1, `[R]`: test where the tangents cross."""
    rise, fall = walk.tangent[:, -1], tangent[:, -1]
    turned = (rise > 0.0) & (fall < 0.0)
    if not bool(turned.any()):
        return turned
    before, after = walk.u[:, -1], u[:, -1]
    return turned & (before + rise * (after - before - fall * length) / (rise - fall) >= 1.0)


def _curve(problem: RowProblem, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`h(p, t) = p - 1 + t (1 - target)`, and the parts of its Jacobian.

    Args:
        problem: R problems.
        u: Points (p, t), `[R, H + 1]`.

    Returns:
        h `[R, H]`, the Jacobian of the scores `[R, H, H]`, `t sigmoid'` `[R, H]` and dh/dt `[R, H]`.
    """
    p, t = u[:, :-1], u[:, -1:]
    target, slope = problem.evaluate(p)
    missing = 1.0 - target
    return torch.addcmul(p, t, missing) - 1.0, slope(), t * target * missing, missing


class _Factors:
    """An LU factorisation of R matrices `[R, n, n]`."""

    def __init__(self, matrix: Tensor) -> None:
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(self, right: Tensor) -> Tensor:
        """Solve for right-hand sides `[R, m, k]`; the last n - m rows are zero."""
        right = pad(right, (0, 0, 0, self.lu.shape[-1] - right.shape[-2]))
        solution: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, right)
        return solution

    def positive(self) -> Tensor:
        """Whether the determinant is positive, `[R]`: the parity of row swaps and negative pivots."""
        unmoved = torch.arange(1, self.lu.shape[-1] + 1, dtype=self.pivots.dtype, device=self.lu.device)
        flips = (self.lu.diagonal(dim1=-2, dim2=-1) < 0) ^ (self.pivots != unmoved)
        even: Tensor = flips.sum(-1) % 2 == 0
        return even


def _bordered(slope: Tensor, weight: Tensor, missing: Tensor, tangent: Tensor) -> _Factors:
    """The Jacobian of h with the tangent as its last row: regular along the curve, also where t turns back."""
    eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    by_p = torch.addcmul(eye, weight[..., None], slope, value=-1.0)
    return _Factors(torch.cat([torch.cat([by_p, missing[..., None]], -1), tangent[:, None]], -2))


def _land(problem: RowProblem, before: Tensor, after: Tensor, pace: Pace) -> Tensor:
    """Newton at t = 1, from the point where the last step crossed it; NaN in rows where it leaves the step."""
    share = (1.0 - before[:, -1:]) / (after - before)[:, -1:]
    start = torch.lerp(before, after, share)[:, :-1]
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    p, moved = start, torch.full_like(start[:, 0], torch.inf)
    for _ in range(LANDING_STEPS):
        target, slope = problem.linearize(p)
        system = _Factors(eye - slope)
        step = system.solve((target - p)[..., None])[..., 0]
        arrived = moved <= ARRIVED
        p = torch.where(arrived[:, None], p, p + step)
        moved = torch.where(arrived, moved, _largest(step))
        if not bool((moved > ARRIVED).any()):
            break
    # Accept a converged root only within the last step, in p and in scores: otherwise it may lie on another branch.
    off = problem.score(p) - problem.score(start)
    good = (
        (moved <= NEAR_ENOUGH) & (_largest(p - start) <= _largest(after - before)) & (_largest(off) <= 4.0 * pace.nats)
    )
    good &= system.positive()  # the orientation of the first rise through t = 1
    return torch.where(good[:, None], p, torch.nan)
