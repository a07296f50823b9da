"""The stock flash kernels for CUDA devices, for float16 and bfloat16: attention that returns its log-sum-exp.

The same operation as `flash` on the CPU. PyTorch's kernel (`flash_attn/flash_api.cpp`: `mha_fwd`, `mha_bwd`) wants
heads of a multiple of 8 and at most 256, devices from compute capability 8.0 on, and returns the log-sum-exp as
`[B, H, N]` in float32, not padded. Its backward pass takes `out` and the log-sum-exp as they are given, so parts of a
softmax can be differentiated apart. A causal mask it aligns to the last row and column, which is what is meant here
only where there are as many rows as columns.

cuDNN's kernel (`native/cudnn/MHA.cpp`) does the same, on Hopper in two thirds of the time, but prepares itself for
every new shape for some 40 ms: it takes large calls without a mask, unless it is switched off by
`torch.backends.cuda.enable_cudnn_sdp(False)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention.spec import AttentionSpec

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_MULTIPLE, _WIDEST, _OLDEST = 8, 256, (8, 0)
_CUDNN_LEAST, _CUDNN_WIDEST, _CUDNN_OLDEST = 1024, 128, (9, 0)  # rows and columns; heads; devices

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def serves(query: Tensor, value: Tensor, spec: AttentionSpec, self_score: Tensor | None) -> bool:
    """Return whether the stock kernel can compute this call."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= _WIDEST
        and query.numel() > 0
        and value.numel() > 0
        and spec.dropout == 0.0
        and spec.plain
        and self_score is None
        and (not spec.is_causal or query.shape[-2] == value.shape[-2])
        and torch.cuda.get_device_capability(query.device) >= _OLDEST
    )


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    self_score: Tensor | None,
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Return output `[B, H, N, d]` and log-sum-exp `[B, H, N]`; arguments as in `attention`, two of them empty."""
    dim = query.shape[-1]
    if _suits_cudnn(spec, query, key):
        out, lse, *_ = _cudnn_forward(*_padded(query, key, value), None, True, 0.0, False, False, scale=spec.scale)
        return out, lse[..., 0]
    out, lse, *_ = _forward(*_padded(query, key, value), 0.0, spec.is_causal, False, scale=spec.scale)
    return out[..., :dim], lse


def backward(
    spec: AttentionSpec,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    self_score: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: tuple[Tensor, ...],
) -> Gradients:
    """Return the gradients of query, key and value, and None."""
    dim, rows, columns = query.shape[-1], query.shape[-2], key.shape[-2]
    if _suits_cudnn(spec, query, key):
        drawn = torch.zeros((), dtype=torch.int64, device=query.device)  # what dropout would be drawn from
        query, key, value = _padded(query, key, value)
        found = _cudnn_backward(
            grad.contiguous(), query, key, value, out.contiguous(), lse.float().contiguous()[..., None], drawn, drawn,
            None, None, None, rows, columns, 0.0, False, scale=spec.scale,
        )  # fmt: skip
        return *found, None
    grad, query, key, value, out = _padded(grad, query, key, value, out)
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # what dropout would be drawn from
    offset = torch.empty((), dtype=torch.uint64, device=query.device)
    found = _backward(
        grad, query, key, value, out, lse.float().contiguous(), None, None, rows, columns, 0.0, spec.is_causal,
        seed, offset, scale=spec.scale,
    )  # fmt: skip
    d_query, d_key, d_value = (t[..., :dim] for t in found)
    return d_query, d_key, d_value, None


def _suits_cudnn(spec: AttentionSpec, query: Tensor, key: Tensor) -> bool:
    return (
        not spec.is_causal
        and min(query.shape[-2], key.shape[-2]) >= _CUDNN_LEAST
        and query.shape[-1] % _MULTIPLE == 0
        and query.shape[-1] <= _CUDNN_WIDEST
        and query.device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and torch.cuda.get_device_capability(query.device) >= _CUDNN_OLDEST
    )


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Heads padded with zeros to the kernel's multiple, rows contiguous."""
    missing = -tensors[0].shape[-1] % _MULTIPLE
    tensors = tuple(F.pad(t, (0, missing)) if missing else t for t in tensors)
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
