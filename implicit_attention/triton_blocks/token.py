"""What calls the Triton kernel for the row equation of one token per sample."""

from torch import Tensor

from implicit_attention.kernels.triton.token import settle_token
from implicit_attention.triton_blocks.call import padded


def solve_token(key: Tensor, made: Tensor, lse: Tensor, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the equation of one token per sample in one launch, without a look at any number.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, float32 or wider, as are `made` and `lse`.
        made: The query before its norm as a linear map of `(1, p)`, `[B, G, 1 + H, d]`.
        lse: The log-sum-exp of all other columns, `[B, H]`.
        eps: Of the norm; None without one.

    Returns:
        The weights on the own column `[B, H]`; how far one more step would move them, inf in samples that are not
        solved; the query of the output before its rotation, `[B, G, d]`.
    """
    batch, heads, dim = key.shape
    groups, dp, hp = made.shape[1], padded(dim), padded(heads)
    p, moved, query = key.new_empty(batch, heads), key.new_empty(batch, heads), key.new_empty(batch, groups, dim)
    settle_token[(batch,)](
        key.contiguous(), made.contiguous(), lse.contiguous(), p, moved, query,
        key.new_empty(batch, groups, hp * hp + hp + 1), 0.0 if eps is None else eps, eps is not None, heads, groups,
        dim, dp, hp, num_warps=4, num_stages=1,
    )  # fmt: skip
    return p, moved, query
