"""Versions and machine, which every figure is kept with."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from implicit_attention import __version__


def environment() -> dict[str, Any]:
    """Return versions, processor and threads, ready for JSON."""
    return {
        "versions": {
            "implicit-attention": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "transformers", "matplotlib")},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, from /proc on Linux, else from `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
