"""Compiled diagonal blocks for the CPU (numba): the same equations as `diagonal`, many times faster.

Importing this room does not import numba; `engine`, which does, is imported where it is used.
"""

import logging
import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from implicit_attention.causal_system import CausalSystem
from implicit_attention.errors import Came, bad_value

KERNELS = ("auto", "torch", "numba")
_WORTH_IT = 8  # rows; preparing the kernels costs more than fewer rows do (a decoded token is one)


def kernels() -> Any:
    """Return the room with the compiled kernels; the first time on a machine compiles them, and says so."""
    told = threading.Timer(
        5.0,
        logging.getLogger("implicit_attention").warning,
        ["Compiling the kernels of kernel='numba' for this processor: once, a minute or two; then they are kept."],
    )
    told.daemon = True
    told.start()
    try:
        return import_module("implicit_attention.native.engine")
    finally:
        told.cancel()


def chosen(kernel: str, system: CausalSystem) -> str:
    """Return which kernel computes the diagonal blocks of a map: "torch" or "numba".

    Args:
        kernel: What is asked for: "auto" takes numba where it is installed, serves the map, and pays.
        system: The map.

    Returns:
        The kernel.

    Raises:
        ImportError: If numba is asked for and missing.
        ValueError: If it is asked for and cannot compute the map.
    """
    if kernel == "torch":
        return "torch"
    hindrance, missing = _hindrance(system), find_spec("numba") is None
    if kernel == "auto":
        return "torch" if missing or hindrance or system.length < _WORTH_IT else "numba"
    if missing:
        raise ImportError("kernel=\"numba\" needs numba: pip install 'implicit-attention[cpu]'")
    if hindrance:
        raise bad_value(
            "kernel",
            '"auto" or "torch" unless the layer runs on the CPU in float32 or float64, without dropout',
            Came(f'"numba" where {hindrance}'),
        )
    return "numba"


def _hindrance(system: CausalSystem) -> str | None:
    if system.key.device.type != "cpu":
        return f"the tensors are on {system.key.device}"
    kinds = {t.dtype for t in (system.key, system.value)}
    if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, kinds)))}"
    return "dropout is on" if system.spec.dropout else None
