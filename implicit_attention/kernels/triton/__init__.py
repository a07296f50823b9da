"""Triton kernels: the diagonal blocks of a causal solve and of its adjoint, the merge by log-sum-exp, residuals.

Importing this room does not import triton; its modules, which do, are imported where they are used. They know tensors
alone; `triton_blocks` calls them for a causal map.
"""

import os
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, as the environment says; ask before the first one runs."""
    return os.environ.get("TRITON_INTERPRET") == "1"


OLDEST = (3, 6)  # 3.5 does not compile the row solver of normed queries


@lru_cache(maxsize=1)
def outdated() -> str | None:
    """Return why the installed Triton cannot compile the kernels, in words; None if it can, or if there is none."""
    try:
        version: str = import_module("triton").__version__
    except ImportError:
        return None
    known = tuple(int(part) for part in version.split(".")[:2])
    return None if known >= OLDEST else f"Triton {version} is installed, and {'.'.join(map(str, OLDEST))} is needed"


def misplaced(tensor: Tensor) -> str | None:
    """Return why no kernel runs where a tensor is, in words; None if they do."""
    device = tensor.device
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index == current:
            return outdated()
        return f"the tensors are on {device} and the current device is {current}, which torch.cuda.set_device changes"
    return None if device.type == "cpu" and interpreted() else f"the tensors are on {device}"
