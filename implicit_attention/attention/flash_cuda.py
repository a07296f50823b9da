"""PyTorch's flash kernels for CUDA devices, for float16 and bfloat16: attention that returns its log-sum-exp.

The operation is that of `flash_cpu`. What PyTorch's flash kernel requires (`flash_attn/flash_api.cpp`: `mha_fwd`,
`mha_bwd`): a head size that is a multiple of 8 and at most 256, and compute capability 8.0 or newer. It returns the
log-sum-exp as `[B, H, N]` in float32, without padding. Its backward pass takes `out` and the log-sum-exp as they are
given, so a softmax can be differentiated in parts. It aligns a causal mask to the last row and column. That is the mask
meant here only if there are as many rows as columns.

cuDNN's kernel (`native/cudnn/MHA.cpp`) takes about two thirds of the time on Hopper, but about 40 ms to plan each new
shape. So it computes large calls without a mask. `torch.backends.cuda.enable_cudnn_sdp(False)` switches it off.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention.spec import AttentionSpec, Inputs

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_MULTIPLE, _WIDEST, _OLDEST = 8, 256, (8, 0)  # head sizes and compute capability that the flash kernel serves
# From this many rows and columns on, planning a shape in cuDNN pays; its largest head size; its compute capability.
_CUDNN_LEAST, _CUDNN_WIDEST, _CUDNN_OLDEST = 1024, 128, (9, 0)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def serves(query: Tensor, value: Tensor, spec: AttentionSpec, self_score: Tensor | None) -> bool:
    """Return whether one of the kernels computes this call."""
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


def forward(spec: AttentionSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return output `[B, H, N, d]` and log-sum-exp `[B, H, N]`; arguments as in `chunked.forward`."""
    query, key, value = inputs[:3]
    dim = query.shape[-1]
    if _suits_cudnn(spec, query, key):
        out, lse, *_ = _cudnn_forward(*_padded(query, key, value), None, True, 0.0, False, False, scale=spec.scale)
        return out, lse[..., 0]
    out, lse, *_ = _forward(*_padded(query, key, value), 0.0, spec.is_causal, False, scale=spec.scale)
    return out[..., :dim], lse


def backward(spec: AttentionSpec, grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor) -> Gradients:
    """Return the gradients of query, key and value, and None for the self score."""
    query, key, value = inputs[:3]
    dim, rows, columns = query.shape[-1], query.shape[-2], key.shape[-2]
    if _suits_cudnn(spec, query, key):
        drawn = torch.zeros((), dtype=torch.int64, device=query.device)  # state of dropout, which is off
        query, key, value = _padded(query, key, value)
        found = _cudnn_backward(
            grad.contiguous(), query, key, value, out.contiguous(), lse.float().contiguous()[..., None], drawn, drawn,
            None, None, None, rows, columns, 0.0, False, scale=spec.scale,
        )  # fmt: skip
        return *found, None
    grad, query, key, value, out = _padded(grad, query, key, value, out)
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # state of dropout, which is off
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
        and torch.version.hip is None  # which calls its devices "cuda", too
        and not torch.are_deterministic_algorithms_enabled()  # its backward pass adds with atomics
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and torch.cuda.get_device_capability(query.device) >= _CUDNN_OLDEST
    )


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Pad heads with zeros to a multiple of `_MULTIPLE`, and make rows contiguous."""
    missing = -tensors[0].shape[-1] % _MULTIPLE
    tensors = tuple(F.pad(t, (0, missing)) if missing else t for t in tensors)
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
