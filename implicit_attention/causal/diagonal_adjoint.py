"""The adjoint of a diagonal block: sweeps over its rows, from the last to the first, until they settle.

If sweeps are slow, each row's own column is solved for exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.causal.diagonal import MOST_SWEEPS, PATIENCE, SLOW, DiagonalBlock
from implicit_attention.causal.system import CausalSystem, Queries

# Distance of a gain from 1 at which the adjoint is reported: errors of the gradient grow by 1 / distance.
NEAR_SINGULAR = 1e-3


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
