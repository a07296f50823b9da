"""Whether Triton's kernels can run, and why not. Importing this module does not import triton."""

import os
import re
from importlib import import_module

import torch
from torch import Tensor


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


OLDEST = (3, 6)  # 3.5 fails to compile the row equations of normed queries


def check_version(argument: str) -> None:
    """Refuse a version of Triton that does not compile the kernels.

    Args:
        argument: The setting that needs the kernels, as in `kernel='triton'`.

    Raises:
        ImportError: If the version is too old.
    """
    if interpreted():
        return
    version: str = import_module("triton").__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"{argument} needs Triton {needed} or newer, which comes with PyTorch 2.10, and {version} is installed. "
            'Update both: pip install --upgrade torch "implicit-attention[gpu]".'
        )


def misplaced(tensor: Tensor) -> str | None:
    """Return why the kernels cannot run on a tensor's device, in words; None if they can."""
    device = tensor.device
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index == current:
            return None
        # Triton launches on the current device, wherever the tensors are.
        return f"the tensors are on {device} and the current device is {current}, which torch.cuda.set_device changes"
    return None if device.type == "cpu" and interpreted() else f"the tensors are on {device}"
