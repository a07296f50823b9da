"""The adjoint of a diagonal block: sweeps over its rows, from the last to the first, until they settle.

Each row's own column is solved for exactly, so after t sweeps the last t rows are final.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.causal.diagonal import MOST_SWEEPS
from implicit_attention.causal.diagonal_block import DiagonalBlock
from implicit_attention.causal.own_columns import own_slopes
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
        slope: Cotangent of the scores with their biases, `[B, H, n, n]`; from compiled kernels that were not asked for
            them all, the diagonal alone, `[B, H, n, 1]`.
        residual: Residual of the adjoint equation, `[B]`.
        sweeps: Number of sweeps.
        near_singular: Number of rows with an eigenvalue within `NEAR_SINGULAR` of 1.
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
        self.strict_weights = self.weights.clone()
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
        own = None if self.given_own is not None else _OwnColumns(self)
        # Rows after the block first; then each sweep makes one more row exact. The rest lets rounding decay.
        f = self._pulled(grad, later)
        lam = f if own is None else own.solve(f)
        done = torch.zeros_like(allowed, dtype=torch.bool)  # each sample stops for itself
        residual = torch.full_like(allowed, torch.inf)
        for sweep in range(1, self.n + MOST_SWEEPS):  # noqa: B007 -- reported
            pulled = self._pulled(grad, later + self._d_query(self._slope(lam, self.strict_weights)))
            # f lacks the part of the own columns, which lam has in full.
            residual = torch.where(done, residual, (pulled - f).abs_().amax((1, 2, 3)))
            done |= residual <= allowed
            if bool(done.all()):
                break
            f = torch.lerp(f, pulled, (~done)[:, None, None, None].to(f.dtype))
            lam = f if own is None else own.solve(f)
        slope = self._slope(lam, self.weights)
        d_query = later + self._d_query(slope if self.given_own is None else slope.tril(-1))
        d_made = self.system.before_map(d_query, self.queries, self.rows)
        return self._gradients(lam, slope, d_made, residual, sweep, 0 if own is None else own.near_singular)

    def _pulled(self, grad: Tensor, d_query: Tensor) -> Tensor:
        """`grad + (d phi / d y)^T d_query`, `[B, n, H, d]`."""
        return grad + self.system.through_map(self.system.before_map(d_query, self.queries, self.rows))

    def _slope(self, lam: Tensor, weights: Tensor) -> Tensor:
        """The cotangent of the scores, `[B, H, n, n]`, for weights that are those of the map or some of them."""
        lam = lam.transpose(1, 2)
        folded = lam.reshape(len(self.folded_value), -1, self.system.dim)
        slope = torch.bmm(folded, self.folded_value.mT).view(*self.shape, self.n)
        if self.keep is not None:
            slope *= self.keep
        return slope.sub_((lam * self.y).sum(-1, keepdim=True)).mul_(weights)

    def _d_query(self, slope: Tensor) -> Tensor:
        """The cotangent of the block's queries, `[B, n, G, d]`, from that of its scores."""
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
        self.u = (block.p[..., None] * (block.own_value - block.y)).transpose(1, 2).contiguous()  # [B, n, H, d]
        slopes = own_slopes(block.system, block.rows, block.queries)  # [H, B, n, H, d]
        matrix = (slopes * self.u).sum(-1).movedim(0, 2)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # The slopes times the inverse: lam = f + sum_h (u_h . f_h) response_h.
        by_row = slopes.movedim(0, 2).flatten(-2)
        response = torch.linalg.solve_ex(eye - matrix, by_row)[0]
        self.response = response.movedim(2, 0).reshape(slopes.shape)
        # Only matrices with a norm near 1 or above can have an eigenvalue near 1.
        self.near_singular = near_singular(matrix[matrix.flatten(2).norm(dim=-1) > 1.0 - NEAR_SINGULAR])

    def solve(self, f: Tensor) -> Tensor:
        """Solve for lam, `[B, n, H, d]`."""
        along = (self.u * f).sum(-1).movedim(2, 0)  # [H, B, n]
        lam: Tensor = f + (self.response * along[..., None, None]).sum(0)
        return lam


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
