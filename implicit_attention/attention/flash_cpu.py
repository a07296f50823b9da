"""PyTorch's flash kernel for the CPU: tiled attention that returns its log-sum-exp.

Dao, Fu, Ermon, Rudra and Re, "FlashAttention", arXiv 2205.14135 (2022). The backward pass needs only the final output
and log-sum-exp. So a softmax can be computed, merged and differentiated in parts.
"""

import math

import torch
from torch import Tensor

from implicit_attention.attention.spec import AttentionSpec, Inputs

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_FEW = 64  # rows

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def serves(query: Tensor, value: Tensor, spec: AttentionSpec, self_score: Tensor | None) -> bool:
    """Return whether the kernel computes this call. Its backward pass gives no gradient of a bias."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and value.numel() > 0
        and spec.dropout == 0.0
        and (self_score is None or spec.plain)
    )


def forward(spec: AttentionSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return output `[B, H, N, d]` and log-sum-exp `[B, H, N]`; arguments as in `chunked.forward`."""
    self_score, tensors = inputs[3], inputs[4:]
    query, key, value = _rows_contiguous(*inputs[:3])
    if self_score is not None:
        return _forward_merging_diagonal(spec, query, key, value, self_score)
    if spec.plain:
        out, lse = _forward(query, key, value, 0.0, spec.is_causal, scale=spec.scale)
        return _visible(out, lse, query, key, spec.scale)
    outs, lses = [], []
    for rows, cols in spec.chunks(query, key):
        bias = _bias(spec, tensors, rows, cols, query)
        k, v = key[..., cols, :], value[..., cols, :]
        out, lse = _forward(query[..., rows, :], k, v, attn_mask=bias, scale=spec.scale)
        unseen = torch.isneginf(bias).all(-1)  # PyTorch's kernel returns zeros and lse = 0 for these rows
        out, lse = _visible(out, lse, query[..., rows, :], k, spec.scale, bias)
        outs.append(out)
        lses.append(lse.masked_fill(unseen, -torch.inf))
    return torch.cat(outs, -2), torch.cat(lses, -1)


def backward(spec: AttentionSpec, grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor) -> Gradients:
    """Return the gradients of query, key, value and self score (None without one)."""
    self_score, tensors = inputs[3], inputs[4:]
    grad, query, key, value = _rows_contiguous(grad, *inputs[:3])
    if self_score is not None:
        return _backward_splitting_diagonal(spec, grad, query, key, value, self_score, out, lse)
    if spec.plain:
        dq, dk, dv = _backward(grad, query, key, value, out, lse, 0.0, spec.is_causal, scale=spec.scale)
        return dq, dk, dv, None
    lse = lse.masked_fill(torch.isneginf(lse), 0.0)  # rows that see nothing: -inf - -inf would give NaN
    d_query, d_key, d_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for rows, cols in spec.chunks(query, key):
        bias = _bias(spec, tensors, rows, cols, query)
        dq, dk, dv = _backward(
            *(t[..., rows, :] for t in (grad, query)),
            *(t[..., cols, :] for t in (key, value)),
            *(out[..., rows, :], lse[..., rows].contiguous(), 0.0, False),
            attn_mask=bias,
            scale=spec.scale,
        )
        d_query.append(dq)
        d_key[..., cols, :] += dk
        d_value[..., cols, :] += dv
    return torch.cat(d_query, -2), d_key, d_value, None


def _forward_merging_diagonal(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, self_score: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend strictly below the diagonal, then merge each row's own column, whose score is given."""
    out, lse = value.clone(), self_score.to(_wide(query.dtype), copy=True)
    n = query.shape[-2]
    if n > 1:
        # Row i + 1 against column i: shifted by one, "strictly below the diagonal" is the kernel's causal mask.
        parts = _forward(query[..., 1:, :], key[..., :-1, :], value[..., :-1, :], 0.0, True, scale=spec.scale)
        below, below_lse = _visible(parts[0], parts[1], query[..., 1:, :], key[..., :-1, :], spec.scale)
        weight = torch.sigmoid(lse[..., 1:] - below_lse)[..., None].to(value.dtype)
        out[..., 1:, :] = torch.lerp(below, value[..., 1:, :], weight)
        lse[..., 1:] = torch.logaddexp(lse[..., 1:], below_lse)
    return out, lse


def _backward_splitting_diagonal(
    spec: AttentionSpec,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    self_score: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """Differentiate both parts of `_forward_merging_diagonal` under the merged output and log-sum-exp."""
    weight = torch.exp(self_score.to(lse.dtype) - lse)[..., None].to(value.dtype)  # [B, H, N, 1]
    d_score = (weight * grad * (value - out)).sum(-1).to(self_score.dtype)
    d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), weight * grad
    if query.shape[-2] > 1:
        dq, dk, dv = _backward(
            *(grad[..., 1:, :], query[..., 1:, :], key[..., :-1, :], value[..., :-1, :]),
            *(out[..., 1:, :], lse[..., 1:].contiguous(), 0.0, True),
            scale=spec.scale,
        )
        d_query[..., 1:, :] = dq
        d_key[..., :-1, :] = dk
        d_value[..., :-1, :] += dv
    return d_query, d_key, d_value, d_score


def _bias(spec: AttentionSpec, tensors: tuple[Tensor, ...], rows: slice, cols: slice, query: Tensor) -> Tensor:
    bias = spec.bias(tensors, rows, cols, query)
    if bias is None:  # the window hides nothing in this chunk
        return torch.zeros((), dtype=query.dtype, device=query.device).expand(
            1, 1, rows.stop - rows.start, cols.stop - cols.start
        )
    return bias.expand(*bias.shape[:2], rows.stop - rows.start, cols.stop - cols.start)


def _visible(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return NaN in rows whose scores hold NaN or Inf.

    PyTorch's kernel returns zeros for such rows, as for rows whose columns are all hidden. One visible column with a
    score and a value of 0 gives zeros too.
    """
    if not _all_plain(lse):
        broken = ~torch.isfinite(lse) | (lse == 0)
        broken = broken & ((lse != 0) | ((out == 0).all(-1) & _may_overflow(query, key, scale)))
        if bias is not None:
            broken = (broken | torch.isnan(bias).any(-1) | torch.isposinf(bias).any(-1)) & ~torch.isneginf(bias).all(-1)
        out, lse = out.masked_fill(broken[..., None], torch.nan), lse.masked_fill(broken, torch.nan)
    return out, lse


def _all_plain(lse: Tensor) -> bool:
    """Whether no number is 0, Inf or NaN."""
    if lse.numel() <= _FEW:  # a decode step: looking at numbers is quicker than more operations
        return all(number != 0 and math.isfinite(number) for number in lse.flatten().tolist())
    return not bool((~torch.isfinite(lse) | (lse == 0)).any())


def _may_overflow(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Whether a row's scores may leave the range of numbers: none is above the product of its vectors' lengths."""
    largest: Tensor = query.double().norm(dim=-1) * key.double().norm(dim=-1).amax(-1, keepdim=True) * max(1.0, scale)
    return ~(largest < torch.finfo(_wide(query.dtype)).max)  # NaN may


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors whose last dimension is not contiguous: the kernel ignores that stride."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
