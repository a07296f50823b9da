"""A row and its own column: how the row's own scores depend on its output.

If all other columns of a row are known, its H own weights decide its output. The Jacobian of the row therefore has rank
one per head, and an H x H system solves for it exactly (Woodbury).
"""

import torch
from torch import Tensor

from implicit_attention.causal.system import CausalSystem, Queries


def own_slopes(system: CausalSystem, rows: slice, queries: Queries) -> Tensor:
    """Return how the own scores of rows depend on their outputs: `d s_g / d y_h`, `[H, B, n, H, d]`, g first.

    Args:
        system: The map.
        rows: The rows.
        queries: Queries of their outputs.
    """
    key = system.key[:, :, rows].to(system.wide).transpose(1, 2) * system.spec.scale  # [B, n, H, d]
    shared = system.heads // system.groups
    if shared > 1:
        query, *others = (None if t is None else t.repeat_interleave(shared, 2) for t in queries)
        assert query is not None
        queries = Queries(query, *others)
    made = system.before_map(key, queries, rows)  # [B, n, H d]
    if system.weight is None:  # one head, whose key has absorbed Omega_Q
        return made.view(1, *key.shape)
    by_group = made.reshape(-1, system.groups, shared, system.dim).permute(1, 2, 0, 3).flatten(1, 2)
    weight = system.weight.to(system.wide).view(system.groups, system.dim, -1)
    return torch.bmm(by_group, weight).view(system.heads, *key.shape)


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
    value = system.per_head(system.value[:, :, rows].to(system.wide)).transpose(1, 2)
    keep = system.keep(rows)
    if keep is not None:
        value = value * keep.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
    along = (value - y) * p.transpose(1, 2)[..., None]
    return (own_slopes(system, rows, queries) * along).sum(-1).movedim(0, 2)


class NewtonStep:
    """One step of Newton's iteration on the own weights of all rows of a block, with the other columns as they are.

    With a the attention over the other columns and p the own weights, a sweep makes `f = a + p (v - a)` from y. To
    first order the weights at the row's own solution are `p + delta` with

        (I - M) delta = S (f - y),    M = S (v - a),    S_gh = p_g (1 - p_g) (d s_g / d y_h).
    """

    def __init__(self, system: CausalSystem, rows: slice, queries: Queries, along: Tensor, p: Tensor) -> None:
        """Linearise.

        Args:
            system: The map.
            rows: The rows of the block.
            queries: Queries of y.
            along: v - a, `[B, n, H, d]`.
            p: The own weights, `[B, H, n]`.
        """
        slopes = own_slopes(system, rows, queries)
        self.share = (p * (1.0 - p)).transpose(1, 2)[..., None]  # [B, n, H, 1]
        matrix = self.share * (slopes * along).sum(-1).movedim(0, 2)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse, singular = torch.linalg.inv_ex(eye - matrix)  # [B, n, H, H]
        self.inverse = inverse.masked_fill(singular.bool()[..., None, None], 0.0)  # no step where there is none
        self.slopes = slopes.flatten(-2)

    def weights(self, p: Tensor, change: Tensor) -> Tensor:
        """Return the weights after the step, `[B, H, n]`, for `change = f - y`, `[B, n, H, d]`."""
        right = (self.slopes * change.flatten(-2)).sum(-1).movedim(0, 2)[..., None] * self.share
        delta = (self.inverse @ right)[..., 0].transpose(1, 2)
        after: Tensor = (p + delta).clamp_(0.0, 1.0)
        return after
