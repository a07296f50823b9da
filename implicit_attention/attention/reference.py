"""The oracle: attention as it is defined, with all scores in memory at once."""

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    self_score: Tensor | None = None,
    self_value: Tensor | None = None,
    keep: Tensor | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Return `softmax(scale q k^T + bias) v` and the log-sum-exp of the scores.

    It uses plain differentiable operations, so every derivative of every other implementation is checked against it.

    Args:
        query: `[B, H, R, d]`.
        key: `[B, H, M, d]`.
        value: `[B, H, M, d_v]`.
        scale: Factor on the scores.
        bias: Added to the scores, broadcastable to `[B, H, R, M]`; `-inf` hides an entry.
        self_score: `[B, H, R]`; replaces `scale q_i . k_i` on the diagonal, before the bias.
        self_value: `[B, H, R, d_v]`; replaces the value of row r's diagonal column in row r.
        keep: `[B, H, R, M]`; factors on the weights (dropout).
        first_row: Position of the first row: the diagonal of row r is column first_row + r.

    Returns:
        Output `[B, H, R, d_v]` and log-sum-exp `[B, H, R]`. In rows that see no column they are zero and `-inf`.
    """
    probabilities, lse = weights(query, key, scale=scale, bias=bias, self_score=self_score, first_row=first_row)
    if keep is not None:
        probabilities = probabilities * keep
    out = probabilities.to(value.dtype) @ value
    if self_value is not None:
        own = probabilities.diagonal(first_row, dim1=-2, dim2=-1)[..., None].to(value.dtype)
        out = out + own * (self_value - value[..., first_row : first_row + query.shape[-2], :])
    return out, lse


def weights(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    self_score: Tensor | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the attention weights `[B, H, R, M]` and log-sum-exp `[B, H, R]`; arguments as in `attend`."""
    scores = (query @ key.transpose(-2, -1)) * scale
    if scores.dtype in (torch.float16, torch.bfloat16):  # the softmax is computed in float32 or wider
        scores = scores.float()
    if self_score is not None:
        scores = torch.diagonal_scatter(scores, self_score.to(scores.dtype), first_row, dim1=-2, dim2=-1)
    if bias is not None:
        scores = scores + bias
    peak = scores.detach().amax(-1, keepdim=True)  # detached: the result does not depend on it
    peak = peak.masked_fill(torch.isneginf(peak), 0.0)  # a row that sees no column gets weights 0, not NaN
    exponentials = torch.exp(scores - peak)
    total = exponentials.sum(-1, keepdim=True)
    lse = (total.detach().log() + peak).squeeze(-1)
    return exponentials / total.masked_fill(total == 0, 1.0), lse
