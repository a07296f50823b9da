"""Which root the rows of a diagonal block settle at: the one that depends on the row alone (`rows.solve_rows`)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.causal.diagonal_block import BlockRows, mixed
from implicit_attention.causal.rows import solve_rows

# Sweeps that solve all hard row equations by the curve. Later ones do so only for rows whose earlier rows are final.
DEEP = 3
# Change of the own weight that still counts as the same root: above the error of sweeps, below the gap between roots.
# Near a fold a residual e is an error of sqrt(e), so torch takes sqrt(10 tolerance) if that is less.
SAME_ROOT = 1e-2
# Times that a settled row may move to another root. Beyond it, rounding decides between the roots.
MOST_JUMPS = 4


class Sweep(NamedTuple):
    """What a sweep over the rows of a block found.

    Attributes:
        a: Attention to all columns except a row's own, `[B, n, H, d]`.
        lse: Its log-sum-exp, `[B, H, n]`.
        p: Weight of the own column, `[B, H, n]`.
        f: F(y), `[B, n, H, d]`.
    """

    a: Tensor
    lse: Tensor
    p: Tensor
    f: Tensor


class OwnRoots:
    """The roots of the row equations of a block, as far as they were solved.

    Attributes:
        given_up: Rows whose equation cannot be solved, `[B, n]`.
    """

    def __init__(self, block: BlockRows, start: Tensor) -> None:
        """Begin with no root.

        Args:
            block: The block.
            start: Scores of the own column at y = v, `[B, H, n]`.
        """
        self.block, self._start = block, start
        batch, heads, n = block.shape
        new = block.key.new_zeros
        self.given_up = new(batch, n, dtype=torch.bool)
        self._jumps = new(batch, n, dtype=torch.long)
        self._deep = new(batch, dtype=torch.long).fill_(DEEP)
        self._roots = new(batch, n, heads).fill_(torch.nan)

    def solve_slow(self, sweep: Sweep, slow: Tensor, final: Tensor, tolerance: float) -> Tensor:
        """Solve the equations of rows that settle slowly.

        Those before which all rows are final get all methods. If these fail, the row is given up: it stays as it is.

        Args:
            sweep: The last sweep.
            slow: The rows, `[B, n]`.
            final: Rows that are final, `[B, n]`.
            tolerance: Of weights.

        Returns:
            F(y) with these rows' own solutions, `[B, n, H, d]`.
        """
        slow = slow & ~self.given_up
        if not bool(slow.any()):
            return sweep.f
        # A row is next if all rows before it are final.
        before_final = final[:, :-1].long().cumprod(1).bool()
        is_next = torch.cat([torch.ones_like(final[:, :1]), before_final], 1)
        deep = slow & (is_next | (self._deep > 0)[:, None])
        self._deep -= slow.any(1).long()
        return self._solve(sweep, slow & ~deep, deep, is_next, tolerance)[0]

    def check(self, sweep: Sweep, tolerance: float) -> tuple[Tensor, Tensor]:
        """Solve the equations of rows that may be at another root than the wanted one; all rows are final.

        Args:
            sweep: The last sweep.
            tolerance: Of weights.

        Returns:
            F(y) with these rows' own solutions, `[B, n, H, d]`, and the samples in which a row moves, `[B]`.
        """
        marked = ~self._contracted(sweep, tolerance) & ~self.given_up
        if not bool(marked.any()):
            return sweep.f, marked.any(1)
        self._roots.fill_(torch.nan)  # roots that were found on the way here may lead elsewhere
        nothing = torch.zeros_like(marked)
        f, jumped = self._solve(sweep, nothing, marked, nothing, tolerance)
        self._jumps += jumped
        return f, (jumped & (self._jumps <= MOST_JUMPS)).any(1)

    def _contracted(self, sweep: Sweep, tolerance: float) -> Tensor:
        """Which rows are at the root of method 1 of `solve_rows`, `[B, n]`."""
        block, tolerance = self.block, self._least(tolerance)
        steps = [torch.ones_like(sweep.p), block.own_weight(self._start, sweep.lse)]
        for _ in range(2):
            query = block.system.phi(mixed(sweep.a, block.value, steps[-1]), block.rows).query
            steps.append(block.own_weight(block.own_score(query), sweep.lse))
        first, second, third = ((new - old).abs_().amax(1) for old, new in pairwise(steps))
        halves = (second <= (0.5 * first).clamp_min_(tolerance)) & (third <= (0.5 * second).clamp_min_(tolerance))
        return halves & ((sweep.p - steps[-1]).abs_().amax(1) <= third.clamp_min_(tolerance))

    def _least(self, tolerance: float) -> float:
        """The tolerance, or what rounding allows."""
        return max(tolerance, 32 * torch.finfo(self._roots.dtype).eps)

    def _solve(
        self, sweep: Sweep, shallow: Tensor, deep: Tensor, lost: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Solve some rows' own equations.

        Args:
            sweep: The last sweep.
            shallow: Rows for method 1 of `solve_rows` alone, `[B, n]`.
            deep: Rows for all of its methods, `[B, n]`.
            lost: Rows that are given up if these fail, `[B, n]`.
            tolerance: Of weights.

        Returns:
            F(y) with the rows' own solutions, and which rows were not at the root already, `[B, n]`.
        """
        a, lse, p, f = sweep
        out, jumped, tolerance = f.clone(), torch.zeros_like(deep), self._least(tolerance)
        same = min(SAME_ROOT, (10.0 * tolerance) ** 0.5)
        for rows, thorough in ((shallow, False), (deep, True)):
            samples, positions = rows.nonzero(as_tuple=True)
            if not len(samples):
                continue
            problem, value = self.block.row_problem(a, lse, samples, positions)
            found = solve_rows(problem, tolerance, self._roots[samples, positions], thorough=thorough)
            solved = found.solved | found.exact
            over = lost[samples, positions] & ~solved & found.p.isfinite().all(-1) & thorough
            self.given_up = self.given_up.index_put((samples[over], positions[over]), over[over])
            used = solved | over
            noise = problem.rounding(found.p)[used]
            self._roots[samples[solved], positions[solved]] = found.p[solved]
            samples, positions, root = samples[used], positions[used], found.p[used]
            out[samples, positions] = torch.lerp(a[samples, positions], value[used], root[..., None])
            moved = (root - p.transpose(1, 2)[samples, positions]).abs().amax(-1)
            jumped[samples, positions] = moved > same + 4.0 * noise
        return out, jumped
