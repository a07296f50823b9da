"""Diagonal blocks of a causal equilibrium and of its adjoint: sweeps over the rows of a block until they settle.

A sweep evaluates the map for all rows of a block at once. If a row's weight on its own column hardly depends on its
output, sweeps settle the row. Otherwise its row equation is solved exactly (`rows`). After t exact sweeps the first t
rows are final, for any weights; usually all rows are. The adjoint goes from the last row to the first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.causal.rows import RowProblem, solve_rows
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.errors import NonFiniteError

# What the constants trade. "Own weight": the weight p of a row on its own column.
# Change of the own weight since y = v that sends a row to the row solver. Larger: fewer row equations are solved, but
# a row may settle at a root that iteration from y = v does not reach. Several roots need a slope p (1 - p) beta > 1.
FAR = 0.25
# Sweeps until the block is halved. Larger: hard blocks lose more work. Smaller: blocks that would settle are halved.
MOST_SWEEPS = 24
# Sweeps before slow rows are solved exactly. Most blocks settle in fewer, and a sweep is cheaper than row equations.
PATIENCE = 8
# Ratio of residuals between two sweeps that counts as slow: at 0.7 a digit takes 6.5 sweeps.
SLOW = 0.7
# Sweeps that solve all hard row equations by the curve. Later ones do so only for rows whose earlier rows are final.
DEEP = 3
# Change of the own weight that still counts as the same root: above the error of sweeps, below the gap between roots.
SAME_ROOT = 1e-2
# Times that a settled row may move to another root. Beyond it, rounding decides between the roots.
MOST_JUMPS = 4
# Distance of a gain from 1 at which the adjoint is reported: errors of the gradient grow by 1 / distance.
NEAR_SINGULAR = 1e-3


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
            before: Attention over the columns before the block, `[B, H, n, d]`.
            before_lse: Its log-sum-exp `[B, H, n]`.
        """
        super().__init__(system, rows)
        self.before, self.before_lse = before.contiguous(), before_lse.contiguous()
        self.deep = DEEP
        self.given_up = torch.zeros(system.batch, self.n, dtype=torch.bool, device=self.key.device)
        self.jumps = torch.zeros(system.batch, self.n, dtype=torch.long, device=self.key.device)
        self.slow = torch.zeros(system.batch, self.n, dtype=torch.bool, device=self.key.device)
        self.solved = torch.zeros_like(self.slow)  # rows whose row equation was solved in some sweep
        self.roots = torch.full((system.batch, self.n, system.heads), torch.nan, dtype=system.wide).to(self.key.device)

    def settle(self, rtol: float, atol: float) -> Block:
        """Sweep until every row's residual is within `atol + rtol max|F(y)|`, or too few rows become final.

        A row also counts as final in two cases, and its residual says so. Its residual no longer falls and is as small
        as the rounding of its scores allows. Or all rows before it are final and its own equation cannot be solved.

        Each sample stops for itself: its result does not depend on other samples.

        Args:
            rtol: Relative tolerance.
            atol: Absolute tolerance.

        Returns:
            The block; `settled` says whether it settled.

        Raises:
            NonFiniteError: If the map returns NaN or Inf.
        """
        system = self.system
        limit = MOST_SWEEPS if self.n > 1 else 2 * MOST_SWEEPS  # a single row cannot be halved
        start = self._start()
        # Attention to earlier columns is usually closest to the output; a row without any starts from its value.
        y = torch.where(torch.isneginf(self.before_lse)[..., None], self.own_value, self.before)
        before = y.new_full((system.batch, self.n), torch.inf)
        done = torch.zeros(system.batch, dtype=torch.bool, device=y.device)
        asked = max(1, MOST_SWEEPS // 6)  # rows that must be final by then
        for sweep in range(1, limit + 3 * PATIENCE * self.n):
            queries = system.phi(y.transpose(1, 2), self.rows)
            a, lse, own = self.attend(queries.query)
            p = self.own_weight(own, lse)
            f = torch.lerp(a, self.own_value, p[..., None])
            residual = (f - y).abs_().amax((1, 3))
            size = f.abs().amax((1, 3))
            allowed = size * rtol + atol
            if sweep == 1 and not bool(torch.isfinite(residual).all()):
                raise NonFiniteError("the map gave NaN or Inf")
            within = residual <= allowed
            held = self.given_up
            final = within | held
            if sweep > 2 * PATIENCE and not bool(within.all()):
                noise = self._noise(queries.query, size)
                final |= (residual <= noise) & (residual > SLOW * before)
            ready = final.all(1) & ~done
            if start is not None:  # otherwise own weights do not depend on outputs, and there is one root
                far = ((self.own_weight(start, lse) - p).abs_() > FAR).any(1)
                if sweep > PATIENCE:
                    # After n exact sweeps all rows would be final: rows that are not by then need their equations.
                    self.slow |= ~within & (residual > SLOW * before) if sweep <= self.n else ~within
                # Slow rows; rows that just became far; and, before a sample is accepted, all rows that could be at
                # another root.
                marked = self.slow & ~done[:, None] | far & ~self.solved | (far | self.solved) & ready[:, None]
                marked &= ~held
                if bool(marked.any()):
                    # Of p, whose error the distance from a to v multiplies.
                    reach = (self.own_value - a).abs_().amax((1, 3)).clamp_min_(1.0)
                    tolerance = 0.1 * float((allowed / reach).min())
                    front = final[:, :-1].long().cumprod(1).bool()
                    next_ones = torch.cat([torch.ones_like(final[:, :1]), front], 1)
                    deep = torch.zeros_like(marked)
                    if sweep > PATIENCE or bool(ready.any()):  # before, rows may still become easier
                        deep = marked & next_ones if self.deep == 0 else marked
                        self.deep = max(0, self.deep - 1)
                    f, jumped = self._solve_own(marked, deep, next_ones, (a, lse, p, f), tolerance)
                    jumped &= ready[:, None]
                    self.jumps += jumped
                    ready &= ~(jumped & (self.jumps <= MOST_JUMPS)).any(1)  # at the root that is wanted
            before = residual
            done |= ready
            if bool(done.all()):
                break
            if sweep == limit:
                reached = int((final | done[:, None]).long().cumprod(1).sum(1).min())
                if reached < asked:
                    break
                limit, asked = limit + PATIENCE, reached + PATIENCE // 4
            y = torch.where((done[:, None] | held)[:, None, :, None], y, f)
        total = torch.logaddexp(lse, own)
        return Block(y.transpose(1, 2), queries, total, residual, size, sweep, bool(done.all()))

    def own_score(self, query: Tensor) -> Tensor:
        """Scores of the own column, `[B, H, n]`, for queries `[B, n, G, d]`."""
        return self._biased((self.key * self.system.per_head(query.transpose(1, 2))).sum(-1))

    def attend(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return attention over all columns except a row's own, its log-sum-exp, and the score of the own column."""
        own = self.given_own
        if self.n == 1:  # as in decoding: all other columns are before the block
            return self.before, self.before_lse, self.own_score(query) if own is None else own
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
        return a, total.log_().add_(peak), own

    def own_weight(self, own: Tensor, lse: Tensor) -> Tensor:
        """The weight of the own column, `[B, H, n]`; 0 if the own column is hidden."""
        p = torch.sigmoid(own - lse)
        return p if self.own_bias is None else p.masked_fill_(torch.isneginf(own), 0.0)

    def _start(self) -> Tensor | None:
        """Scores of the own column at the start y = v, `[B, H, n]`; None if scores of own columns are given."""
        if self.given_own is not None:
            return None
        return self.own_score(self.system.phi(self.own_value.transpose(1, 2), self.rows).query)

    def _solve_own(
        self, marked: Tensor, deep: Tensor, next_ones: Tensor, now: tuple[Tensor, ...], tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Solve the marked rows' own equations, the deep ones as far as that goes.

        Args:
            marked: `[B, n]`.
            deep: `[B, n]`, some of the marked rows.
            next_ones: `[B, n]`, rows before which all are final: what is not solved there never will be.
            now: Attention over the other columns, its log-sum-exp, the own weight and F(y), of all rows.
            tolerance: Of weights.

        Returns:
            F(y) with the rows' own solutions, and which rows were not at the root already, `[B, n]`.
        """
        a, lse, p, f = now
        out, jumped = f.clone(), torch.zeros_like(marked)
        tolerance = max(tolerance, 32 * torch.finfo(a.dtype).eps)
        for rows, thorough in ((marked & ~deep, False), (deep, True)):
            samples, positions = rows.nonzero(as_tuple=True)
            if not len(samples):
                continue
            problem, value = self.row_problem(a, lse, samples, positions)
            found = solve_rows(problem, tolerance, self.roots[samples, positions], thorough=thorough)
            solved = found.solved | found.exact
            over = next_ones[samples, positions] & ~solved & found.p.isfinite().all(-1) & thorough
            self.given_up = self.given_up.index_put((samples[over], positions[over]), over[over])
            used = solved | over
            noise = problem.rounding(found.p)[used]
            self.roots[samples[solved], positions[solved]] = found.p[solved]
            self.solved[samples[solved], positions[solved]] = True
            samples, positions, root = samples[used], positions[used], found.p[used]
            rows_a = a.transpose(1, 2)[samples, positions]
            out.transpose(1, 2)[samples, positions] = torch.lerp(rows_a, value[used], root[..., None])
            moved = (root - p.transpose(1, 2)[samples, positions]).abs().amax(-1)
            jumped[samples, positions] = moved > SAME_ROOT + 4.0 * noise
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
        made = system.contributions(a.transpose(1, 2)[samples, positions])  # [R, G, H, d]
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


@dataclass
class BlockAdjoint:
    """The solved adjoint of a block.

    Attributes:
        lam: `[B, n, H, d]`.
        d_made: Cotangent of the linear map's output, `[B, n, G d]`.
        d_key: Cotangent of the keys, `[B, H, n, d]`.
        d_value: Cotangent of the values, `[B, G, n, d]`.
        slope: Cotangent of the scores with their biases, `[B, H, n, n]`.
        residual: Residual of the adjoint equation, `[B]`.
        sweeps: Number of sweeps.
        near_singular: Number of rows with a gain within `NEAR_SINGULAR` of 1.
    """

    lam: Tensor
    d_made: Tensor
    d_key: Tensor
    d_value: Tensor
    slope: Tensor
    residual: Tensor
    sweeps: int
    near_singular: int


class BlockAdjointSolver(DiagonalBlock):
    """Solves `lam = g + J^T lam` on a block, given the cotangents from the rows after it."""

    def __init__(self, system: CausalSystem, rows: slice, y: Tensor, queries: Queries, lse: Tensor) -> None:
        """Linearise at the equilibrium.

        Args:
            system: The map.
            rows: The rows of the block.
            y: Outputs `[B, n, H, d]`.
            queries: Queries of these outputs.
            lse: Log-sum-exp `[B, H, n]`.
        """
        super().__init__(system, rows)
        self.y, self.queries = y.transpose(1, 2), queries
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        scores = self.scores(queries.query)
        own = self.given_own
        if own is None:
            own = self._biased(scores.diagonal(dim1=-2, dim2=-1)).clone()
        scores += self.strict
        self.weights = scores.sub_(seen[..., None]).exp_()
        self.p = (own - seen).exp_()
        self.weights.diagonal(dim1=-2, dim2=-1).copy_(self.p)

    def solve(self, grad: Tensor, later: Tensor, allowed: Tensor) -> BlockAdjoint:
        """Sweep until every sample's residual is at most `allowed`.

        Args:
            grad: Cotangent of the outputs, `[B, n, H, d]`.
            later: Cotangent of the queries from the rows after the block, `[B, n, G, d]`.
            allowed: Absolute tolerance, `[B]`.

        Returns:
            The solution and its gradients.
        """
        lam, before = grad, torch.full_like(allowed, torch.inf)
        done = torch.zeros_like(allowed, dtype=torch.bool)  # each sample stops for itself
        own: _OwnColumns | None = None
        # At most n plain sweeps, then n with exact own columns, which solve any block; the rest lets rounding decay.
        for sweep in range(1, 3 * self.n + MOST_SWEEPS):
            slope = self._slope(lam)
            f = self._pulled(grad, later, slope, own is not None)
            # With exact own columns f lacks their part; lam came from the previous f, so compare f with that.
            residual = (f - (lam if own is None else own.f)).abs_().amax((1, 2, 3))
            residual = torch.where(done, before, residual)
            done |= residual <= allowed
            if bool(done.all()):
                break
            slow = sweep > PATIENCE and bool((~done & (residual > (SLOW * before if sweep <= self.n else 0.0))).any())
            if own is None and slow and self.given_own is None:
                own = _OwnColumns(self)
                f = self._pulled(grad, later, slope, True)
                residual = torch.where(done, residual, torch.inf)
            before = residual
            lam = torch.where(done[:, None, None, None], lam, f if own is None else own.solve(f))
        d_made = self._d_made(later, slope, False)
        return self._gradients(lam, slope, d_made, residual, sweep, 0 if own is None else own.near_singular)

    def _d_made(self, later: Tensor, slope: Tensor, strict: bool) -> Tensor:
        """The cotangent of the linear map's output, `[B, n, G d]`."""
        return self.system.before_map(later + self._d_query(slope, strict), self.queries, self.rows)

    def _pulled(self, grad: Tensor, later: Tensor, slope: Tensor, strict: bool) -> Tensor:
        """`g + J^T lam`; without the part of the own columns if `strict`."""
        return grad + self.system.through_map(self._d_made(later, slope, strict))

    def _slope(self, lam: Tensor) -> Tensor:
        """The cotangent of the scores, `[B, H, n, n]`."""
        lam = lam.transpose(1, 2)
        folded = lam.reshape(len(self.folded_value), -1, self.system.dim)
        slope = torch.bmm(folded, self.folded_value.mT).view(*self.shape, self.n)
        if self.keep is not None:
            slope *= self.keep
        return slope.sub_((lam * self.y).sum(-1, keepdim=True)).mul_(self.weights)

    def _d_query(self, slope: Tensor, strict: bool) -> Tensor:
        """The cotangent of the block's queries, `[B, n, G, d]`; without the part of the own columns if `strict`."""
        if strict or self.given_own is not None:
            slope = slope.tril(-1)
        d_query = torch.bmm(slope.view(len(self.folded_key), -1, self.n).mT, self.folded_key)
        return d_query.view(self.shape[0], -1, self.n, self.system.dim).transpose(1, 2)

    def _gradients(
        self, lam: Tensor, slope: Tensor, d_made: Tensor, residual: Tensor, sweeps: int, near_singular: int
    ) -> BlockAdjoint:
        system = self.system
        inner = slope if self.given_own is None else slope.tril(-1)
        columns = self.queries.query.transpose(1, 2).reshape(len(self.folded_value), self.n, -1)
        d_key = torch.bmm(inner.view(len(self.folded_key), -1, self.n), columns).mul_(system.spec.scale)
        kept = self.weights if self.keep is None else self.weights * self.keep
        rows = lam.transpose(1, 2).reshape(len(self.folded_value), -1, system.dim)
        d_value = torch.bmm(kept.view(len(self.folded_key), -1, self.n).mT, rows)
        return BlockAdjoint(
            lam, d_made, d_key.view(*self.shape, -1), d_value.view(self.shape[0], -1, self.n, system.dim),
            slope, residual, sweeps, near_singular,
        )  # fmt: skip


class _OwnColumns:
    """Solves for the own columns: `lam = f + sum_h (grad_y s_h) z_h` with `z_h = u_h . lam_h`, rank one per head.

    So lam follows from H numbers per row: `(I - M^T) z = (u_h . f_h)` (Woodbury). M is the row's own Jacobian. If it
    has an eigenvalue 1, the equilibrium has no derivative in that row.
    """

    def __init__(self, block: BlockAdjointSolver) -> None:
        self.block = block
        self.f: Tensor = block.y
        self.u = block.p[..., None] * (block.own_value - block.y)  # [B, H, n, d]
        matrix = own_jacobian(block.system, block.rows, block.y.transpose(1, 2), block.queries, block.p)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        self.matrix = eye - matrix.mT
        # Only matrices with a norm near 1 or above can have an eigenvalue near 1.
        self.near_singular = near_singular(matrix[matrix.flatten(2).norm(dim=-1) > 1.0 - NEAR_SINGULAR])

    def solve(self, f: Tensor) -> Tensor:
        """Solve for lam, `[B, n, H, d]`."""
        block = self.block
        self.f = f
        right = (self.u * f.transpose(1, 2)).sum(-1).transpose(1, 2)[..., None]  # [B, n, H, 1]
        z = torch.linalg.solve_ex(self.matrix, right)[0][..., 0].transpose(1, 2)  # [B, H, n]
        d_query = (z[..., None] * block.key).view(block.shape[0], block.system.groups, -1, block.n, block.system.dim)
        d_query = d_query.sum(2).transpose(1, 2)
        return f + block.system.through_map(block.system.before_map(d_query, block.queries, block.rows))


def near_singular(matrices: Tensor) -> int:
    """Return how many of the own Jacobians `[R, H, H]` have an eigenvalue within `NEAR_SINGULAR` of 1."""
    if not len(matrices):
        return 0
    try:
        distance = (torch.linalg.eigvals(matrices) - 1.0).abs().amin(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The eigenvalue solver failed. The smallest singular value of M - I is a lower bound of the distance.
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        distance = torch.linalg.svdvals(matrices - eye)[..., -1]
    return int((distance < NEAR_SINGULAR).sum())


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


def own_jacobian(system: CausalSystem, rows: slice, y: Tensor, queries: Queries, p: Tensor) -> Tensor:
    """The Jacobian of each row equation, `[B, n, H, H]`: `M_gh = (d s_g / d y_h) . (v_h - y_h) p_h`.

    Its eigenvalues are the non-zero eigenvalues of the row's diagonal block of dF/dy. The result is differentiable.

    Args:
        system: The map.
        rows: The rows.
        y: Their outputs at the equilibrium, `[B, n, H, d]`.
        queries: Queries of these outputs.
        p: Weight of each row's own column, `[B, H, n]`.

    Returns:
        One matrix per row.
    """
    p = p.transpose(1, 2)
    key = system.key[:, :, rows].to(system.wide).transpose(1, 2) * system.spec.scale
    value = system.per_head(system.value[:, :, rows].to(system.wide)).transpose(1, 2)
    keep = system.keep(rows)
    if keep is not None:
        value = value * keep.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
    made = system.contributions((value - y).reshape(-1, system.heads, system.dim))  # [R, G, H, d]
    key = system.before_turn(key, rows)
    query = system.before_turn(queries.query, rows) if queries.normed is None else queries.normed
    if system.norm_weight is not None:
        key = key * system.norm_weight
    if queries.inverse is not None:
        query = query.reshape(-1, system.groups, 1, system.dim)
        made = made - query * (made * query).mean(-1, keepdim=True)
        made = made * queries.inverse.reshape(-1, system.groups, 1, 1)
    slopes = (system.per_head(made) * key.reshape(-1, system.heads, 1, system.dim)).sum(-1)
    return slopes.view(*p.shape, system.heads) * p[:, :, None]
