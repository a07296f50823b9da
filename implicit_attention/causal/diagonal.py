"""Diagonal blocks of a causal equilibrium: sweeps over the rows of a block until they settle.

A sweep evaluates the map for all rows of a block at once, and corrects each row's weights on its own column by a step
of Newton's iteration. If this does not settle a row, or may settle it at another root than the wanted one, its row
equation is solved exactly (`rows`). After t exact sweeps the first t rows are final, for any weights; usually all are.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from implicit_attention.causal.own_columns import NewtonStep
from implicit_attention.causal.rows import RowProblem, solve_rows
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
# Sweeps that solve all hard row equations by the curve. Later ones do so only for rows whose earlier rows are final.
DEEP = 3
# Change of the own weight that still counts as the same root: above the error of sweeps, below the gap between roots.
# Near a fold a residual e is an error of sqrt(e), so it is sqrt(10 tolerance) if that is less.
SAME_ROOT = 1e-2
# Times that a settled row may move to another root. Beyond it, rounding decides between the roots.
MOST_JUMPS = 4


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


class DiagonalBlock:
    """The keys, values and biases of a block, which do not change from sweep to sweep."""

    def __init__(self, system: CausalSystem, rows: slice) -> None:
        """Prepare the tensors of the block.

        Args:
            system: The map.
            rows: The rows of the block.
        """
        self.system, self.rows, self.n = system, rows, rows.stop - rows.start
        self.shape = (system.batch, system.heads, self.n)
        self.key = system.key[:, :, rows].to(system.wide).contiguous() * system.spec.scale
        value = system.value[:, :, rows].to(system.wide)
        # The heads of a group share queries and values: one product per group instead of one per head.
        self.folded_key = self.key.view(system.batch * system.groups, -1, system.dim)
        self.folded_value = value.reshape(system.batch * system.groups, self.n, system.dim)
        self.strict, self.own_bias = system.block_bias(rows)
        self.keep = system.keep(rows)
        self.own_value = system.per_head(value)
        if self.keep is not None:
            self.own_value = self.own_value * self.keep.diagonal(dim1=-2, dim2=-1)[..., None]
        self.given_own: Tensor | None = None
        if system.self_score is not None:
            self.given_own = self._biased(system.self_score[:, :, rows].to(system.wide))

    def _biased(self, own: Tensor) -> Tensor:
        return own if self.own_bias is None else own + self.own_bias

    def scores(self, query: Tensor) -> Tensor:
        """Scores of the block before biases, `[B, H, n, n]`, for queries `[B, n, G, d]`."""
        columns = query.permute(0, 2, 3, 1).reshape(len(self.folded_value), -1, self.n)
        return torch.bmm(self.folded_key, columns).view(*self.shape, self.n)


class BlockSolver(DiagonalBlock):
    """Solves the equations of a block, given attention over all columns before the block."""

    def __init__(self, system: CausalSystem, rows: slice, before: Tensor, before_lse: Tensor) -> None:
        """Prepare the tensors of the block.

        Args:
            system: The map.
            rows: The rows of the block.
            before: Attention over the columns before the block, `[B, n, H, d]`.
            before_lse: Its log-sum-exp `[B, H, n]`.
        """
        super().__init__(system, rows)
        self.before, self.before_lse = before.transpose(1, 2).contiguous(), before_lse.contiguous()
        self.value = self.own_value.transpose(1, 2).contiguous()  # [B, n, H, d]
        samples, device = (system.batch,), self.key.device
        self.given_up = torch.zeros(*samples, self.n, dtype=torch.bool, device=device)
        self.step: NewtonStep | None = None
        self.slow = torch.zeros_like(self.given_up)
        self.plain = torch.zeros_like(self.given_up)  # rows that rounding keeps from their tolerance
        self.jumps = torch.zeros(*samples, self.n, dtype=torch.long, device=device)
        self.deep = torch.full(samples, DEEP, device=device)
        self.roots = torch.full((*samples, self.n, system.heads), torch.nan, dtype=system.wide, device=device)

    def settle(self, rtol: float, atol: float) -> Block:
        """Sweep until every row's residual is within `atol + rtol max|F(y)|`, or too few rows become final.

        A row also counts as final in two cases, and its residual says so. Its residual no longer falls and is as small
        as the rounding of its scores allows. Or all rows before it are final and its own equation cannot be solved.

        A sample whose rows are all final waits, unchanged, for the others. Then the rows that may be at another root
        than the wanted one are solved anew, in all samples at once. Samples in which a row moves go on.

        Args:
            rtol: Relative tolerance.
            atol: Absolute tolerance.

        Returns:
            The block; `settled` says whether it settled.

        Raises:
            NonFiniteError: If the map returns NaN or Inf.
        """
        limit = MOST_SWEEPS if self.n > 1 else 2 * MOST_SWEEPS  # a single row cannot be halved
        start = self._start()
        # Attention to earlier columns is usually closest to the output; a row without any starts from its value.
        alone = torch.isneginf(self.before_lse).transpose(1, 2)[..., None]
        y = torch.where(alone, self.value, self.before.transpose(1, 2))
        waits = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        sweeps = torch.zeros(len(y), 1, dtype=torch.long, device=y.device)  # of each sample, while it does not wait
        before = y.new_full((len(y), self.n), torch.inf)
        asked = max(1, MOST_SWEEPS // 6)  # rows that must be final by then
        for sweep in range(1, limit + 3 * MOST_SWEEPS * self.n):
            queries = self.system.phi(y, self.rows)
            a, lse, own = self.attend(queries.query)
            p = self.own_weight(own, lse)
            f = _mixed(a, self.value, p)
            change = f - y
            residual, size = change.abs().amax((2, 3)), f.abs().amax((2, 3))
            if sweep == 1 and not bool(torch.isfinite(residual).all()):
                raise NonFiniteError("the map gave NaN or Inf")
            held = self.given_up
            final = (residual <= size * rtol + atol) | held
            sweeps += ~waits[:, None]
            if sweep > PATIENCE:
                falls = residual <= SLOW * before
                # After n exact sweeps all rows would be final: rows that are not by then need their equations.
                self.slow |= (sweeps > PATIENCE) & ~final & ~(falls & (sweeps <= self.n))
                rounded = residual <= self._noise(queries.query, size)
                self.plain |= (sweeps > STEADY) & ~falls & rounded
                final |= (sweeps > STEADY + PLAIN) & ~falls & rounded
            before = residual
            waits |= final.all(1)
            everyone = bool(waits.all())
            if start is not None:  # otherwise own weights do not depend on outputs, and there is one root
                corrected = self._newton(sweep, queries, (a, p), f, change)
                f = corrected if sweep <= STEADY else torch.where(self.plain[..., None, None], f, corrected)
                if everyone or sweep > PATIENCE:
                    # Of weights, whose error the distance from a to v multiplies.
                    reach = (self.value - a).abs_().amax((2, 3)).clamp_min_(1.0)
                    tolerance = 0.1 * float(((size * rtol + atol) / reach).min())
                    f, moved = self._at_their_roots(start, (a, lse, p, f), final, waits, tolerance)
                    waits &= ~moved
                    if everyone and bool(moved.any()):  # rows after it start again
                        everyone, limit, asked = False, max(limit, sweep + MOST_SWEEPS // 2), 1
            if everyone:
                break
            if sweep == limit:
                reached = int((final | waits[:, None]).long().cumprod(1).sum(1).min())
                if reached < asked:
                    break
                limit, asked = limit + MORE_SWEEPS, reached + MORE_SWEEPS // 4
            moves = ~(waits[:, None] | held)
            y = torch.lerp(y, f, moves[..., None, None].to(y.dtype))
        total = torch.logaddexp(lse, own)
        return Block(y, queries, total, residual, size, sweep, everyone)

    def own_score(self, query: Tensor) -> Tensor:
        """Scores of the own column, `[B, H, n]`, for queries `[B, n, G, d]`."""
        return self._biased((self.key * self.system.per_head(query.transpose(1, 2))).sum(-1))

    def attend(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to all columns except a row's own.

        Args:
            query: Queries of the block, `[B, n, G, d]`.

        Returns:
            Attention `[B, n, H, d]`, its log-sum-exp and the score of the own column, both `[B, H, n]`.
        """
        own = self.given_own
        if self.n == 1:  # as in decoding: all other columns are before the block
            return self.before.transpose(1, 2), self.before_lse, self.own_score(query) if own is None else own
        scores = self.scores(query)
        if own is None:
            own = self._biased(scores.diagonal(dim1=-2, dim2=-1)).clone()
        scores += self.strict
        # A finite peak, so that rows without columns give exp(-inf) = 0, not NaN.
        peak = torch.maximum(scores.amax(-1), self.before_lse).clamp_min_(torch.finfo(scores.dtype).min)
        weights = scores.sub_(peak[..., None]).exp_()
        old = (self.before_lse - peak).exp_()
        total = weights.sum(-1).add_(old)
        if self.keep is not None:
            weights = weights * self.keep
        a = torch.bmm(weights.view(len(self.folded_key), -1, self.n), self.folded_value)
        a = a.view(*self.shape, -1).addcmul_(old[..., None], self.before)
        a /= total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]
        return a.transpose(1, 2).contiguous(), total.log_().add_(peak), own

    def own_weight(self, own: Tensor, lse: Tensor) -> Tensor:
        """The weight of the own column, `[B, H, n]`; 0 if the own column is hidden."""
        p = torch.sigmoid(own - lse)
        return p if self.own_bias is None else p.masked_fill_(torch.isneginf(own), 0.0)

    def _start(self) -> Tensor | None:
        """Scores of the own column at the start y = v, `[B, H, n]`; None if they do not depend on outputs."""
        if self.given_own is not None or not self.system.reads_output:
            return None
        return self.own_score(self.system.phi(self.value, self.rows).query)

    def _newton(self, sweep: int, queries: Queries, now: tuple[Tensor, Tensor], f: Tensor, change: Tensor) -> Tensor:
        """Return F(y) with own weights that are corrected by a step of Newton's iteration, from the second sweep on.

        Args:
            sweep: Number of the sweep.
            queries: Queries of y.
            now: Attention over the other columns and the own weights.
            f: F(y).
            change: F(y) - y.
        """
        a, p = now
        if sweep == 1:
            return f
        if self.step is None or (sweep - 2) % RELINEARIZED == 0:
            self.step = NewtonStep(self.system, self.rows, queries, self.value - a, p)
        return _mixed(a, self.value, self.step.weights(p, change))

    def _at_their_roots(
        self, start: Tensor, now: tuple[Tensor, ...], final: Tensor, waits: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Solve the equations of slow rows; and, if all samples wait, of rows that may be at another root.

        Args:
            start: Scores of the own column at y = v, `[B, H, n]`.
            now: Attention over the other columns, its log-sum-exp, the own weight and F(y), of all rows.
            final: Rows that are final, `[B, n]`.
            waits: Samples whose rows are all final, `[B]`.
            tolerance: Of weights.

        Returns:
            F(y) with these rows' own solutions, and the samples in which a final row moves to another root, `[B]`.
        """
        a, lse, p, f = now
        tolerance = max(tolerance, 32 * torch.finfo(a.dtype).eps)
        everyone = bool(waits.all())
        marked = ~self._contracted(start, (a, lse, p), tolerance) if everyone else self.slow & ~waits[:, None]
        marked &= ~self.given_up
        if not bool(marked.any()):
            return f, torch.zeros_like(waits)
        if everyone:
            self.roots.fill_(torch.nan)  # the root of a final row depends on the row alone, not on the way there
        front = final[:, :-1].long().cumprod(1).bool()
        next_ones = torch.cat([torch.ones_like(final[:, :1]), front], 1)
        deep = marked & (next_ones | (self.deep > 0)[:, None])
        self.deep -= marked.any(1).long()
        lost = next_ones & ~waits[:, None]  # never solved, if not here; where all wait, rows stay where they are
        f, jumped = self._solve_own(marked, deep, lost, now, tolerance)
        jumped &= waits[:, None]
        self.jumps += jumped
        return f, (jumped & (self.jumps <= MOST_JUMPS)).any(1)

    def _contracted(self, start: Tensor, now: tuple[Tensor, Tensor, Tensor], tolerance: float) -> Tensor:
        """Which rows are at the root of method 1 of `solve_rows`, `[B, n]`; arguments as in `_at_their_roots`."""
        a, lse, p = now
        steps = [torch.ones_like(p), self.own_weight(start, lse)]
        for _ in range(2):
            query = self.system.phi(_mixed(a, self.value, steps[-1]), self.rows).query
            steps.append(self.own_weight(self.own_score(query), lse))
        first, second, third = ((new - old).abs_().amax(1) for old, new in pairwise(steps))
        halves = (second <= (0.5 * first).clamp_min_(tolerance)) & (third <= (0.5 * second).clamp_min_(tolerance))
        return halves & ((p - steps[-1]).abs_().amax(1) <= third.clamp_min_(tolerance))

    def _solve_own(
        self, marked: Tensor, deep: Tensor, lost: Tensor, now: tuple[Tensor, ...], tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Solve the marked rows' own equations, the deep ones as far as that goes.

        Args:
            marked: `[B, n]`.
            deep: `[B, n]`, some of the marked rows.
            lost: `[B, n]`, rows that are given up if they cannot be solved.
            now: Attention over the other columns, its log-sum-exp, the own weight and F(y), of all rows.
            tolerance: Of weights.

        Returns:
            F(y) with the rows' own solutions, and which rows were not at the root already, `[B, n]`.
        """
        a, lse, p, f = now
        out, jumped = f.clone(), torch.zeros_like(marked)
        same = min(SAME_ROOT, (10.0 * tolerance) ** 0.5)
        for rows, thorough in ((marked & ~deep, False), (deep, True)):
            samples, positions = rows.nonzero(as_tuple=True)
            if not len(samples):
                continue
            problem, value = self.row_problem(a, lse, samples, positions)
            found = solve_rows(problem, tolerance, self.roots[samples, positions], thorough=thorough)
            solved = found.solved | found.exact
            over = lost[samples, positions] & ~solved & found.p.isfinite().all(-1) & thorough
            self.given_up = self.given_up.index_put((samples[over], positions[over]), over[over])
            used = solved | over
            noise = problem.rounding(found.p)[used]
            self.roots[samples[solved], positions[solved]] = found.p[solved]
            samples, positions, root = samples[used], positions[used], found.p[used]
            out[samples, positions] = torch.lerp(a[samples, positions], value[used], root[..., None])
            moved = (root - p.transpose(1, 2)[samples, positions]).abs().amax(-1)
            jumped[samples, positions] = moved > same + 4.0 * noise
        return out, jumped

    def _noise(self, query: Tensor, size: Tensor) -> Tensor:
        """What rounding of scores may do to the outputs of rows, `[B, n]`, for queries `[B, n, G, d]`."""
        key, most = self.key.norm(dim=-1), self.system.per_head(query.norm(dim=-1).amax(1))
        score = (key * most[..., None]).amax(1)  # no score of the block is larger
        noise: Tensor = 4.0 * torch.finfo(score.dtype).eps * score * size
        return noise

    def row_problem(self, a: Tensor, lse: Tensor, samples: Tensor, positions: Tensor) -> tuple[RowProblem, Tensor]:
        """The row equations of some rows: scores of the query of `y = a + p (value - a)` with the row's key.

        Returns:
            The problems, and the rows' values `[R, H, d]`.
        """
        system = self.system
        keep = None
        if self.keep is not None:
            keep = self.keep.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[samples, positions]
        key, value, constant = system.row(samples, self.rows.start + positions, keep)
        made = system.contributions(a[samples, positions])  # [R, G, H, d]
        base = made.sum(2) if constant is None else made.sum(2) + constant
        query = torch.cat([base[:, :, None], system.contributions(value) - made], 2)  # q(p) = query (1, p)
        score = (system.per_head(query) @ key[..., None])[..., 0]  # [R, H, 1 + H]
        own_bias = 0.0 if self.own_bias is None else self.own_bias.expand(self.shape)
        offset = (own_bias - lse).transpose(1, 2)[samples, positions]
        if self.own_bias is not None:
            offset = offset.masked_fill(offset.isnan(), -torch.inf)  # -inf + inf: the row sees no column at all
        gram = None
        if system.function.query_map.normalize:
            gram = query @ query.mT / system.dim
            gram[..., 0, 0] += system.function.query_map.eps
            gram = system.per_head(gram)
        return RowProblem(score[..., 0], score[..., 1:], offset, gram), value


def _mixed(a: Tensor, value: Tensor, p: Tensor) -> Tensor:
    """`a + p (value - a)`, `[B, n, H, d]`, for weights `[B, H, n]`."""
    return torch.lerp(a, value, p.transpose(1, 2)[..., None])


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
