"""The diagonal blocks of a causal equilibrium and of its adjoint: sweeps over some rows until they settle.

All rows of a block are evaluated together. A row whose weight on its own column hardly depends on its output is
swept along; the others' own equations are solved exactly (`rows`). After t exact sweeps the first t rows are final,
whatever the weights, and usually all are by then. The adjoint goes from the last row to the first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.attention.positions import unrotate
from implicit_attention.causal.rows import RowProblem, solve_rows
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.errors import NonFiniteError

FAR = 0.25  # change of the own weight between y = v and now beyond which a row's root is found by the row solver
MOST_SWEEPS = 24  # then the block is halved
PATIENCE = 8  # sweeps after which a row that still settles slowly is solved exactly
SLOW = 0.7  # ratio of residuals from sweep to sweep that is slow
DEEP = 3  # sweeps that look for roots of all rows, however long it takes; later ones of rows after final rows alone
SAME_ROOT = 1e-2  # change of the own weight that cannot be another root
MOST_JUMPS = 4  # times that a settled row may turn out to be at another root; beyond, rounding decides which it is
NEAR_SINGULAR = 1e-3  # distance of a gain from 1 at which the adjoint is reported


@dataclass
class Block:
    """A settled block of rows.

    Attributes:
        y: Outputs `[B, n, H, d]`.
        queries: What phi makes of them.
        lse: Log-sum-exp `[B, H, n]`.
        residual: `max |F(y) - y|` per row, `[B, n]`.
        size: `max |F(y)|` per row, `[B, n]`.
        sweeps: How many it took.
        settled: Whether every row is within tolerance, at the root that is wanted.
    """

    y: Tensor
    queries: Queries
    lse: Tensor
    residual: Tensor
    size: Tensor
    sweeps: int
    settled: bool


class Unsettled(Exception):  # noqa: N818 -- no error: the caller starts again
    """A block that was taken for settled had not settled, and what followed on it is void."""


class DiagonalBlock:
    """The keys, values and biases of some rows, as they are in every sweep."""

    def __init__(self, system: CausalSystem, rows: slice) -> None:
        """Prepare them.

        Args:
            system: The map.
            rows: The rows.
        """
        self.system, self.rows, self.n = system, rows, rows.stop - rows.start
        self.shape = (system.batch, system.heads, self.n)
        self.key = system.key[:, :, rows].to(system.wide).contiguous() * system.spec.scale
        value = system.value[:, :, rows].to(system.wide)
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
    """Solves the equations of a block, given attention over everything before it."""

    def __init__(self, system: CausalSystem, rows: slice, before: Tensor, before_lse: Tensor) -> None:
        """Prepare what does not change from sweep to sweep.

        Args:
            system: The map.
            rows: The rows.
            before: Attention over the columns before the block, `[B, H, n, d]`.
            before_lse: Its log-sum-exp `[B, H, n]`.
        """
        super().__init__(system, rows)
        self.before, self.before_lse = before.contiguous(), before_lse.contiguous()
        self.deep = DEEP
        self.given_up = torch.zeros(system.batch, self.n, dtype=torch.bool, device=self.key.device)
        self.jumps = torch.zeros(system.batch, self.n, dtype=torch.long, device=self.key.device)
        self.slow = torch.zeros(system.batch, self.n, dtype=torch.bool, device=self.key.device)
        self.solved = torch.zeros_like(self.slow)  # rows whose own equation was solved in some sweep
        self.roots = torch.full((system.batch, self.n, system.heads), torch.nan, dtype=system.wide).to(self.key.device)

    def settle(self, rtol: float, atol: float) -> Block:
        """Sweep until every row's residual is within `atol + rtol max|F(y)|`, or too few rows become final.

        A row is left as it is too where its residual no longer falls and is as small as rounding of its scores lets
        it be, which is above tolerance for scores of hundreds; and where all rows before it are final and its own
        equation cannot be solved. Its residual says so.

        Samples stop for themselves: what one returns does not depend on the others.

        Args:
            rtol: Relative tolerance.
            atol: Absolute tolerance.

        Returns:
            The block, which may be unsettled.

        Raises:
            NonFiniteError: If the map gives NaN or Inf.
        """
        system = self.system
        limit = MOST_SWEEPS if self.n > 1 else 2 * MOST_SWEEPS
        start = self._start()
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
            if start is not None:
                far = ((self.own_weight(start, lse) - p).abs_() > FAR).any(1)
                if sweep > PATIENCE:
                    self.slow |= ~within & (residual > SLOW * before) if sweep <= self.n else ~within
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
        """Return attention over all columns but a row's own, its log-sum-exp, and the score of the own column."""
        own = self.given_own
        if self.n == 1:  # as in decoding: all other columns come before
            return self.before, self.before_lse, self.own_score(query) if own is None else own
        scores = self.scores(query)
        if own is None:
            own = self._biased(scores.diagonal(dim1=-2, dim2=-1)).clone()
        scores += self.strict
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
        """The weight of the own column, `[B, H, n]`; 0 in rows that see nothing."""
        p = torch.sigmoid(own - lse)
        return p if self.own_bias is None else p.masked_fill_(torch.isneginf(own), 0.0)

    def _start(self) -> Tensor | None:
        """Scores of the own column at the start y = v, `[B, H, n]`; None where they are given."""
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
        """`y = a + p (value - a)`, put through the query map and onto the row's key; and the rows' values."""
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
            offset = offset.masked_fill(offset.isnan(), -torch.inf)  # -inf + inf: sees neither itself nor others
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
        d_key: `[B, H, n, d]`.
        d_value: `[B, G, n, d]`.
        slope: Cotangent of the scores with their biases, `[B, H, n, n]`.
        residual: Of the adjoint equation, `[B]`.
        sweeps: How many it took.
        near_singular: Rows with a gain within `NEAR_SINGULAR` of 1.
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
    """Solves `lam = g + J^T lam` on a block, given what comes from the rows after it."""

    def __init__(self, system: CausalSystem, rows: slice, y: Tensor, queries: Queries, lse: Tensor) -> None:
        """Linearise at the equilibrium.

        Args:
            system: The map.
            rows: The rows.
            y: Outputs `[B, n, H, d]`.
            queries: What phi makes of them.
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
        """Sweep until no sample's residual is above `allowed` `[B]`.

        Args:
            grad: Cotangent of the outputs, `[B, n, H, d]`.
            later: Cotangent of the queries from the rows after the block, `[B, n, G, d]`.
            allowed: Tolerance.

        Returns:
            The solution and the gradients that follow from it.
        """
        lam, before = grad, torch.full_like(allowed, torch.inf)
        done = torch.zeros_like(allowed, dtype=torch.bool)  # samples stop for themselves
        own: _OwnColumns | None = None
        for sweep in range(1, 3 * self.n + MOST_SWEEPS):
            slope = self._slope(lam)
            f = self._pulled(grad, later, slope, own is not None)
            # Once own columns are solved for, f lacks their part, and lam came from the f before.
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
        """`g + J^T lam`, without the own columns if `strict`."""
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
        """The cotangent of the block's queries, `[B, n, G, d]`; `strict`: without the own columns' part."""
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
    """`lam = f + sum_h (grad_y s_h) z_h`, `z_h = u_h . lam_h`: a row's own column is of rank one per head.

    So lam follows from H numbers per row, `(I - M^T) z = (u_h . f_h)` (Woodbury), with M the row's own Jacobian, whose
    eigenvalues decide whether the equilibrium can be differentiated there.
    """

    def __init__(self, block: BlockAdjointSolver) -> None:
        self.block = block
        self.f: Tensor = block.y
        self.u = block.p[..., None] * (block.own_value - block.y)  # [B, H, n, d]
        matrix = own_jacobian(block.system, block.rows, block.y.transpose(1, 2), block.queries, block.p)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        self.matrix = eye - matrix.mT
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
    """Return how many of some own Jacobians, `[R, H, H]`, have an eigenvalue within `NEAR_SINGULAR` of 1."""
    if not len(matrices):
        return 0
    try:
        distance = (torch.linalg.eigvals(matrices) - 1.0).abs().amin(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # No convergence; the smallest singular value of M - I is a lower bound.
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        distance = torch.linalg.svdvals(matrices - eye)[..., -1]
    return int((distance < NEAR_SINGULAR).sum())


def hand_back(into: dict[str, Tensor], y: Tensor, lse: Tensor, rows: slice, done: list[int]) -> int:
    """Return the first row that some sample has not settled; samples that went on get back what they saw before.

    Args:
        into: The tensors of the recursion that a compiled kernel has worked on: y `[B, N, H, d]`, lse `[B, H, N]`.
        y: What the block's rows attended to before it, `[B, n, H, d]`.
        lse: Its log-sum-exp, `[B, H, n]`.
        rows: The block.
        done: How many of its rows each sample has settled.
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
    """The Jacobian of each row's own equation, `[B, n, H, H]`: `M_gh = (d s_g / d y_h) . (v_h - y_h) p_h`.

    Its eigenvalues are those of the row's diagonal block of dF/dy that are not zero. Differentiable.

    Args:
        system: The map.
        rows: The rows.
        y: Their outputs at the equilibrium, `[B, n, H, d]`.
        queries: What phi makes of them.
        p: The weight of each row's own column, `[B, H, n]`.

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
    query = queries.query
    if system.rotation is not None:
        turn = system.rotation[:, :, rows]
        key, query = (unrotate(t, turn) for t in (key, query))
    if queries.inverse is not None:
        query = query.reshape(-1, system.groups, 1, system.dim)
        made = made - query * (made * query).mean(-1, keepdim=True)
        made = made * queries.inverse.reshape(-1, system.groups, 1, 1)
    slopes = (system.per_head(made) * key.reshape(-1, system.heads, 1, system.dim)).sum(-1)
    return slopes.view(*p.shape, system.heads) * p[:, :, None]
