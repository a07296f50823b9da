"""What calls the Triton kernel for the row problem of one new token per sample."""

from torch import Tensor

from implicit_attention.kernels.triton.token import settle_token
from implicit_attention.triton_blocks.engine import TYPES, padded


def solve_token(
    key: Tensor, a: Tensor, step: Tensor, lse: Tensor, weight: Tensor, fixed: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the equation of one token per sample in one launch, without a look at any number.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, float32 or wider, as are `a`, `step` and `lse`.
        a: Attention over the columns before, `[B, H, d]`.
        step: The token's value less that, `[B, H, d]`.
        lse: The log-sum-exp of the columns before, `[B, H]`.
        weight: Omega_Q, `[G d, H d]`.
        fixed: What is added to what it makes, `[B, G d]`, or None.
        eps: Of the norm; None without one.

    Returns:
        The weights on the own column `[B, H]`; how far one more step would move them, inf in samples that are not
        solved; the query of the output before its rotation, `[B, G, d]`.
    """
    batch, heads, dim = a.shape
    groups, dp, hp = len(weight) // dim, padded(dim), padded(heads)
    slot = groups * ((hp + 1) * dp + hp * hp + hp + 1)
    p, moved, query = a.new_empty(batch, heads), a.new_empty(batch, heads), a.new_empty(batch, groups, dim)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    settle_token[(batch,)](
        key.contiguous(), a.contiguous(), step.contiguous(), lse.contiguous(), weight,
        None if fixed is None else fixed.contiguous(), p, moved, query, a.new_empty(batch, slot), weight.stride(0),
        slot, 0.0 if eps is None else eps, eps is not None, heads, groups, dim, dp, hp, TYPES[weight.dtype],
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return p, moved, query
