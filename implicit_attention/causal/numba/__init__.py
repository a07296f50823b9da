"""Compiled diagonal blocks for the CPU (numba): the same equations as `diagonal`, many times faster.

Importing this room does not import numba; `engine`, which does, is imported where it is used.
"""

import torch

from implicit_attention.causal.system import CausalSystem


def hindrance(system: CausalSystem) -> str | None:
    """Return why the kernels cannot compute a map, in words; None if they can."""
    if system.key.device.type != "cpu":
        return f"the tensors are on {system.key.device}"
    kinds = {t.dtype for t in (system.key, system.value)}
    if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, kinds)))}"
    return "dropout is on" if system.spec.dropout else None
