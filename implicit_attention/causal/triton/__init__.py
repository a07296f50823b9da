"""Diagonal blocks of a causal map on CUDA devices: the Triton kernels (`kernels/`), and the modules that call them.

Importing this package does not import triton. `engine` does, and is imported where it is used.
"""

import torch
from torch import Tensor

from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.tiles import too_large
from implicit_attention.equilibrium.triton_available import misplaced


def hindrance(system: CausalSystem) -> str | None:
    """Return why the kernels cannot compute a map, in words; None if they can."""
    elsewhere = misplaced(system.key)
    if elsewhere:
        return elsewhere
    kinds = {t.dtype for t in (system.key, system.value)}
    if not kinds <= {torch.float16, torch.bfloat16, torch.float32, torch.float64} or len(kinds) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, kinds)))}"
    if system.value_map is not None:
        return "values read outputs, row after row, which torch computes"
    if system.norm_weight is not None:
        return "the norm of queries has weights"
    if system.spec.dropout:
        return "dropout is on"
    return too_large(system.key, system.heads, system.dim, maps=system.weight is not None)


def decode_hindrance(key: Tensor, heads: int) -> str | None:
    """Return why the kernels cannot decode tokens, in words; None if they can.

    Args:
        key: Their keys, `[..., H d]`.
        heads: H.
    """
    return misplaced(key) or too_large(key, heads, key.shape[-1] // heads, maps=False)
