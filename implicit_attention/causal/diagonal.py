"""Diagonal blocks of a causal equilibrium: sweeps over the rows of a block until they settle.

A sweep evaluates the map for all rows of a block at once, and corrects each row's weights on its own column by a step
of Newton's iteration. If this does not settle a row, or may settle it at another root than the wanted one, its row
equation is solved exactly (`own_roots`). After t exact sweeps the first t rows are final, for any weights; usually all
are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.causal.diagonal_block import BlockRows, mixed
from implicit_attention.causal.own_columns import NewtonStep
from implicit_attention.causal.own_roots import OwnRoots, Sweep
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.errors import NonFiniteError

# What the constants trade. "Own weight": the weight p of a row on its own column.
# Sweeps until the block is halved. Larger: hard blocks lose more work. Smaller: blocks that would settle are halved.
MOST_SWEEPS = 32
# Sweeps that are added then, as long as a quarter as many rows become final in them.
MORE_SWEEPS = 8
# Sweeps that share a linearisation of the own weights. More: cheaper sweeps, and more of them.
RELINEARIZED = 3
# Sweeps before slow rows are solved exactly. Most blocks settle in fewer, and a sweep is cheaper than row equations.
PATIENCE = 12
# Sweeps after which a row whose residual is as small as rounding, and no longer falls, goes on without Newton's step:
# that amplifies rounding where a row is close to a fold.
STEADY = 16
# Such sweeps before the row counts as final. Below MOST_SWEEPS together, so that no block is halved for it.
PLAIN = 14
# Ratio of residuals between two sweeps that counts as slow: at 0.7 a digit takes 6.5 sweeps.
SLOW = 0.7


@dataclass
class Block:
    """A settled block of rows.

    Attributes:
        y: Outputs `[B, n, H, d]`.
        queries: Queries of these outputs.
        lse: Log-sum-exp `[B, H, n]`.
        residual: `max |F(y) - y|` per row, `[B, n]`.
        size: `max |F(y)|` per row, `[B, n]`.
        sweeps: Number of sweeps.
        settled: Whether every row is within tolerance, at the root that iteration from y = v reaches.
    """

    y: Tensor
    queries: Queries
    lse: Tensor
    residual: Tensor
    size: Tensor
    sweeps: int
    settled: bool


class Unsettled(Exception):  # noqa: N818 -- no error: the caller starts again
    """A block was wrongly assumed to have settled, so the results of later blocks are void."""


class BlockSolver(BlockRows):
    """Solves the equations of a block, given attention over all columns before the block.

    A row is *final* when it no longer has to change, *slow* when its row equation has to be solved, and *stuck* when
    its residual is as small as rounding and no longer falls. A sample *waits* when all its rows are final.
    """

    def __init__(self, system: CausalSystem, rows: slice, before: Tensor, before_lse: Tensor) -> None:
        """Prepare the tensors of the block; arguments as in `BlockRows`."""
        super().__init__(system, rows, before, before_lse)
        start = self.start()
        # If own weights do not depend on outputs, a row has one root.
        self.roots = None if start is None else OwnRoots(self, start)
        self._step: NewtonStep | None = None
        new, rows_shape = self.key.new_zeros, (system.batch, self.n)
        self._sweeps = new(system.batch, 1, dtype=torch.long)  # of each sample, while it does not wait
        self._waits = new(system.batch, dtype=torch.bool)
        self._last_residual = new(rows_shape).fill_(torch.inf)
        self._slow, self._stuck = new(rows_shape, dtype=torch.bool), new(rows_shape, dtype=torch.bool)

    def settle(self, rtol: float, atol: float) -> Block:
        """Sweep until every row's residual is within `atol + rtol max|F(y)|`, or too few rows become final.

        Once all samples wait, rows that may be at another root than the wanted one are solved anew, in all samples at
        once. Samples in which a row moves then go on.

        Args:
            rtol: Relative tolerance.
            atol: Absolute tolerance.

        Returns:
            The block; `settled` says whether it settled.

        Raises:
            NonFiniteError: If the map returns NaN or Inf.
        """
        # Attention to earlier columns is usually closest to the output; a row without any starts from its value.
        alone = torch.isneginf(self.before_lse).transpose(1, 2)[..., None]
        y = torch.where(alone, self.value, self.before.transpose(1, 2))
        allowance = _Allowance(MOST_SWEEPS if self.n > 1 else 2 * MOST_SWEEPS)  # a single row cannot be halved
        for sweep in range(1, allowance.limit + 3 * MOST_SWEEPS * self.n):
            queries = self.system.phi(y, self.rows)
            a, lse, own = self.attend(queries.query)
            p = self.own_weight(own, lse)
            f = mixed(a, self.value, p)  # F(y)
            change = f - y
            residual, size = change.abs().amax((2, 3)), f.abs().amax((2, 3))
            if sweep == 1 and not bool(torch.isfinite(residual).all()):
                raise NonFiniteError("the map gave NaN or Inf")
            allowed = size * rtol + atol
            final = self._judge(sweep, queries, residual, size, allowed)
            all_final, moved = bool(self._waits.all()), False
            if self.roots is not None:
                f = self._newton(sweep, queries, Sweep(a, lse, p, f), change)
                f, moved = self._at_roots(self.roots, sweep, Sweep(a, lse, p, f), final, allowed)
            if moved:
                allowance.begin_again(sweep)
            settled = all_final and not moved
            if settled or allowance.is_spent(sweep, final | self._waits[:, None]):
                break
            stays = self._stays(sweep, final, checked=all_final)
            y = torch.lerp(y, f, (~stays)[..., None, None].to(y.dtype))
        return Block(y, queries, torch.logaddexp(lse, own), residual, size, sweep, settled)

    def _judge(self, sweep: int, queries: Queries, residual: Tensor, size: Tensor, allowed: Tensor) -> Tensor:
        """Return which rows are final, `[B, n]`; note which rows are slow or stuck, and which samples wait.

        A row is final within tolerance, when its equation cannot be solved, or when it has been stuck for long. Its
        residual is reported in all three cases.

        Args:
            sweep: Number of the sweep.
            queries: Queries of y.
            residual: `max |F(y) - y|`, `[B, n]`.
            size: `max |F(y)|`, `[B, n]`.
            allowed: Largest residual within tolerance, `[B, n]`.
        """
        final = (residual <= allowed) | self._given_up()
        self._sweeps += ~self._waits[:, None]
        if sweep > PATIENCE:
            falls = residual <= SLOW * self._last_residual
            # After n exact sweeps all rows would be final: rows that are not by then need their equations.
            self._slow |= (self._sweeps > PATIENCE) & ~final & ~(falls & (self._sweeps <= self.n))
            stuck = ~falls & (residual <= self.rounding(queries.query, size))
            self._stuck |= (self._sweeps > STEADY) & stuck
            final |= (self._sweeps > STEADY + PLAIN) & stuck
        self._last_residual = residual
        self._waits |= final.all(1)
        return final

    def _given_up(self) -> Tensor:
        """Rows whose equation cannot be solved, `[B, n]`."""
        return torch.zeros_like(self._slow) if self.roots is None else self.roots.given_up

    def _stays(self, sweep: int, final: Tensor, *, checked: bool) -> Tensor:
        """Return which rows do not change in the next sweep, `[B, n]`.

        Args:
            sweep: Number of the sweep.
            final: Which rows are final, `[B, n]`.
            checked: Whether the roots were checked in this sweep: that moves final rows.
        """
        stays = self._waits[:, None] | self._given_up()
        if sweep > STEADY + PLAIN and not checked:
            # The first rows, up to one that is not final, would change by their rounding, which later rows amplify.
            stays = stays | (final & ~self._slow).long().cumprod(1).bool()
        return stays

    def _newton(self, sweep: int, queries: Queries, found: Sweep, change: Tensor) -> Tensor:
        """Return F(y) with own weights that are corrected by a step of Newton's iteration, from the second sweep on.

        Args:
            sweep: Number of the sweep.
            queries: Queries of y.
            found: What the sweep found.
            change: F(y) - y.
        """
        if sweep == 1:
            return found.f
        if self._step is None or (sweep - 2) % RELINEARIZED == 0:
            self._step = NewtonStep(self.system, self.rows, queries, self.value - found.a, found.p)
        corrected = mixed(found.a, self.value, self._step.weights(found.p, change))
        return corrected if sweep <= STEADY else torch.where(self._stuck[..., None, None], found.f, corrected)

    def _at_roots(
        self, roots: OwnRoots, sweep: int, found: Sweep, final: Tensor, allowed: Tensor
    ) -> tuple[Tensor, bool]:
        """Return F(y) with slow rows solved exactly; if all rows are final, with those at other roots moved.

        Args:
            roots: The row equations.
            sweep: Number of the sweep.
            found: What it found.
            final: Which rows are final, `[B, n]`.
            allowed: Largest residual within tolerance, `[B, n]`.

        Returns:
            F(y), and whether rows were moved: their samples and all rows after them go on.
        """
        all_final = bool(self._waits.all())
        if not all_final and sweep <= PATIENCE:
            return found.f, False
        # Tolerance of weights: an error e of p is an error e |v - a| of the output.
        reach = (self.value - found.a).abs_().amax((2, 3)).clamp_min_(1.0)
        tolerance = 0.1 * float((allowed / reach).min())
        if not all_final:
            return roots.solve_slow(found, self._slow & ~self._waits[:, None], final, tolerance), False
        f, moved = roots.check(found, tolerance)
        self._waits &= ~moved
        return f, bool(moved.any())


class _Allowance:
    """How many sweeps a block may take: `limit`, and more as long as rows become final."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.expected = max(1, MOST_SWEEPS // 6)  # first rows that must be final when the limit is reached

    def is_spent(self, sweep: int, final: Tensor) -> bool:
        """Return whether no sweep is left, given which rows are final, `[B, n]`; raise the limit if enough are."""
        if sweep < self.limit:
            return False
        reached = int(final.long().cumprod(1).sum(1).min())
        if reached < self.expected:
            return True
        self.limit, self.expected = self.limit + MORE_SWEEPS, reached + MORE_SWEEPS // 4
        return False

    def begin_again(self, sweep: int) -> None:
        """Allow more sweeps after a check that moved rows: those after them start again."""
        self.limit, self.expected = max(self.limit, sweep + MOST_SWEEPS // 2), 1


def hand_back(into: dict[str, Tensor], y: Tensor, lse: Tensor, rows: slice, done: list[int]) -> int:
    """Return the first row that is not settled in all samples; restore the state of later rows in the other samples.

    The recursion goes on with all samples from the same row, so rows that only some samples have settled are undone.

    Args:
        into: The tensors of the recursion that a compiled kernel has changed: y `[B, N, H, d]`, lse `[B, H, N]`.
        y: Attention over the columns before the block, `[B, n, H, d]`.
        lse: Its log-sum-exp, `[B, H, n]`.
        rows: The block.
        done: Number of settled rows of each sample.
    """
    least = min(done)
    for b, settled in enumerate(done):
        if settled > least:
            undone = slice(rows.start + least, rows.start + settled)
            into["y"][b, undone] = y[b, least:settled]
            into["lse"][b, :, undone] = lse[b, :, least:settled]
    first: int = rows.start + least
    return first
