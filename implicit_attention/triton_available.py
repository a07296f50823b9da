"""Whether Triton's kernels can run here, and if not, why. Importing this module does not import triton."""

import os
import re
from importlib import import_module

import torch
from torch import Tensor


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, as the environment says; ask before the first one runs."""
    return os.environ.get("TRITON_INTERPRET") == "1"


OLDEST = (3, 6)  # 3.5 does not compile the row solver of normed queries


def check_version(argument: str) -> None:
    """Refuse a Triton that does not compile the kernels.

    Args:
        argument: What asks for them, as in `kernel='triton'`.

    Raises:
        ImportError: If it is too old.
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
    """Return why no kernel runs where a tensor is, in words; None if they do."""
    device = tensor.device
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index == current:
            return None
        return f"the tensors are on {device} and the current device is {current}, which torch.cuda.set_device changes"
    return None if device.type == "cpu" and interpreted() else f"the tensors are on {device}"
