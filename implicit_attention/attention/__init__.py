"""Attention with its log-sum-exp: one operation, several implementations.

`attention` is the operation: differentiable twice, forward-mode differentiable, vmappable. The
implementations never import each other: `reference` is the readable oracle, `chunked` serves every
option on every device, `flash` calls the stock kernel that PyTorch ships for the CPU, `flash_cuda` those for CUDA
devices.
"""

from implicit_attention.attention.operation import attention
from implicit_attention.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "attention"]
