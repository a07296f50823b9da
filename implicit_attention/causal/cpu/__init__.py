"""The diagonal blocks of causal maps on the CPU, in C++: the same equations as `diagonal`, many times faster.

Importing this room loads nothing; `engine`, which does, is imported where it is used.
"""

import torch

from implicit_attention.causal.cpu.build import NAME
from implicit_attention.causal_system import CausalSystem


def hindrance(system: CausalSystem) -> str | None:
    """Return why the kernels cannot compute a map, in words; None if they can."""
    if system.key.device.type != "cpu":
        return f"the tensors are on {system.key.device}"
    kinds = {t.dtype for t in (system.key, system.value)}
    if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, kinds)))}"
    return None


__all__ = ["NAME", "hindrance"]
