"""Attention with its log-sum-exp: one operation, several implementations.

`attention` is the operation. It is differentiable twice, differentiable in forward mode, and works under `vmap`.

| implementation | what it is |
| --- | --- |
| `reference` | the readable oracle that all others are checked against |
| `chunked` | every option on every device |
| `flash_cpu` | PyTorch's flash kernel for the CPU |
| `flash_cuda` | PyTorch's flash kernels for CUDA devices |

`flash_cpu` and `flash_cuda` import no other implementation; `chunked` calls `reference`.
"""

from implicit_attention.attention.operation import attention
from implicit_attention.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "attention"]
