"""The diagonal blocks of causal maps on the CPU, in C++: the same equations as `diagonal`, many times faster.

Importing this room loads nothing; `engine`, which does, is imported where it is used.
"""

import platform
import sys
from functools import cache

import torch

from implicit_attention.causal.cpu import library
from implicit_attention.causal.cpu.build import REASON
from implicit_attention.causal.cpu.library import VARIABLE, capability
from implicit_attention.causal.system import CausalSystem


def hindrance(system: CausalSystem) -> str | None:
    """Return why the kernels cannot compute a map, in words; None if they can."""
    if system.key.device.type != "cpu":
        return f"the tensors are on {system.key.device}"
    kinds = {t.dtype for t in (system.key, system.value)}
    if not kinds <= {torch.float16, torch.bfloat16, torch.float32, torch.float64} or len(kinds) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, kinds)))}"
    if system.value_map is not None and system.norm_weight is not None:
        return "values read outputs and the norm of queries has weights, both of which torch computes"
    return None


@cache
def problem() -> str | None:
    """Return why the kernels cannot be used on this machine, with what to do about it; None if they can."""
    compiler = {"linux": "g++", "darwin": "the Xcode command line tools"}.get(sys.platform)
    if compiler is None:
        return f"there are no C++ kernels for {platform.system()} yet; use kernel='torch'."
    again = "`pip install --force-reinstall --no-deps --no-cache-dir` the package from its source."
    if not library.PATH.exists():
        if REASON.exists():
            return f"the C++ kernels were not built when the package was installed:\n{REASON.read_text()}\nThen {again}"
        return f"the C++ kernels were not built when the package was installed. Install {compiler}, then {again}"
    try:
        library.load()
    except (OSError, ImportError, AttributeError) as error:
        return f"the C++ kernels cannot be loaded ({str(error).rstrip('.')}). Build them again: {again}"
    return None


__all__ = ["VARIABLE", "capability", "hindrance", "problem"]
