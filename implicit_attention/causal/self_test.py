"""Whether an engine gives on a device what torch gives: small solves, once per device and versions.

What has passed is kept in the user's folder of caches, so that only the first process on a machine waits for it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.map import AttentionMap, QueryMap

# Solve a map's equation, decode its last row and solve its adjoint with the engine named: arguments kernel, map, its
# tensors, cotangent.
Solve = Callable[[str, AttentionMap, tuple[Tensor, ...], Tensor], list[Tensor]]

# Engines solve to 1e-5 of the size, which a gain of 0.99 makes 1e-3. If torch may take TF32 for its products, it is off
# by as much itself. A kernel that is wrong is off by 1.
_ALLOWED = 1e-2
# One program for each sample; blocks that are swept, with attention between them; enough of these for CUDA graphs.
_LENGTHS = (5, 300, 1100)


def path() -> Path:
    """Return the file that names what has passed."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "implicit_attention" / "self_tests.json"


@cache
def verdict(kernel: str, device: torch.device, solve: Solve) -> str | None:
    """Return what is wrong with an engine on a device, in words; None if it agrees with torch.

    Args:
        kernel: The engine.
        device: Where it is tried, unless it has been.
        solve: What solves.
    """
    name, passed = _named(kernel, device), _read()
    if name in passed:
        return None
    try:
        wrong = _compared(kernel, device, solve)
    except Exception as error:  # whatever a compiler or a device may raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if wrong is None:  # another process may have better luck where this one fails
        _write([*passed, name])
    return wrong


def _named(kernel: str, device: torch.device) -> str:
    what = [kernel, torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)]
    for package in ("torch", "triton", "implicit-attention"):
        try:
            what.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            what.append(f"{package} unknown")
    return ", ".join([*what, f"sources {_sources(kernel)}"])


def _sources(kernel: str) -> str:
    """A hash of an engine's files: in a checkout they change while the version stays."""
    files = sorted((Path(__file__).parent / kernel).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _read() -> list[str]:
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):  # none yet, or not readable: the tests run again
        return []
    return found if isinstance(found, list) else []


def _write(passed: list[str]) -> None:
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            whole = Path(folder) / target.name
            whole.write_text(json.dumps(passed, indent=1))
            os.replace(whole, target)  # at once: other processes read the old file or the new one
    except OSError:  # a home that cannot be written to: the next process tests again
        return


@torch.no_grad()
def _compared(kernel: str, device: torch.device, solve: Solve) -> str | None:
    for length in _LENGTHS:
        function, args, grad = _problem(length, device)
        with torch.autocast(device.type, enabled=False):
            expected, found = (solve(name, function, args, grad) for name in ("torch", kernel))
        for name, right, tried in zip(("the output", "a decoded token", *function.names), expected, found, strict=True):
            off = float((tried - right).abs().max() / right.abs().max())
            if not off <= _ALLOWED:
                return f"{name} at {length} tokens is off by {off:.1e} of its size"
    return None


def _problem(length: int, device: torch.device) -> tuple[AttentionMap, tuple[Tensor, ...], Tensor]:
    """A causal map with normed queries and two heads of 16, its tensors, and a cotangent."""
    batch, heads, dim = 2, 2, 16
    random, dtype = torch.Generator().manual_seed(0), torch.float32
    shapes = {"weight": (heads * dim,) * 2, "key": (batch, heads, length, dim), "value": (batch, heads, length, dim)}
    args = {name: torch.randn(shape, generator=random, device="cpu", dtype=dtype) for name, shape in shapes.items()}
    args["weight"] *= dim**-0.5
    grad = torch.randn(batch, length, heads * dim, generator=random, device="cpu", dtype=dtype)
    function = AttentionMap(AttentionSpec(dim**-0.5, True), QueryMap(heads, True), True, tuple(args))
    return function, tuple(t.to(device) for t in args.values()), grad.to(device)
