"""Whether Triton's kernels can run, and why not. Importing this module does not import triton."""

import os
import re
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

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
    kind = tensor.device.type
    return None if kind == "cuda" or (kind == "cpu" and interpreted()) else f"the tensors are on {tensor.device}"


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one: Triton launches there, wherever the tensors are.

    Args:
        device: The tensors' device.

    Returns:
        The context; one that does nothing on other devices.

    Raises:
        RuntimeError: If a CUDA graph is being captured there.
    """
    if device.type != "cuda":
        return nullcontext()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A solve reads whether it has settled, and a CUDA graph that is being captured cannot wait for that. Use "
            'torch.compile(layer, mode="reduce-overhead"), which leaves solves out of its graphs.'
        )
    return torch.cuda.device(device)
