"""Whether an engine gives on a device what torch gives: small solves, once per device and versions.

The verdict is kept in the user's folder of caches, so that only the first process on a machine waits for it.
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

# Engines solve to 1e-5 of the size. A gain of 0.99 makes that an error of 1e-3; a kernel that is wrong is off by 1.
_ALLOWED = 1e-3
_LENGTHS = (5, 160)  # one block, and several with attention between them


def path() -> Path:
    """Return the file that holds the verdicts."""
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
    name, known = _named(kernel, device), _read()
    if name not in known:
        try:
            known[name] = _compared(kernel, device, solve) or ""
        except Exception as error:  # whatever a compiler or a device may raise; the next process tries again
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _write(known)
    return known[name] or None


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


def _read() -> dict[str, str]:
    try:
        found = json.loads(path().read_text())
        return {str(name): str(verdict) for name, verdict in found.items()}
    except (OSError, ValueError, AttributeError):  # none yet, or not readable: the tests run again
        return {}


def _write(known: dict[str, str]) -> None:
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            whole = Path(folder) / target.name
            whole.write_text(json.dumps(known, indent=1))
            os.replace(whole, target)  # at once: other processes read the old file or the new one
    except OSError:  # a home that cannot be written to: the next process tests again
        return


@torch.no_grad()
def _compared(kernel: str, device: torch.device, solve: Solve) -> str | None:
    for length in _LENGTHS:
        function, args, grad = _problem(length, device)
        expected = solve("torch", function, args, grad)
        found = solve(kernel, function, args, grad)
        for name, right, tried in zip(("the output", "a decoded token", *function.names), expected, found, strict=True):
            off = float((tried - right).abs().max() / right.abs().max())
            if not off <= _ALLOWED:
                return f"{name} at {length} tokens is off by {off:.1e} of its size"
    return None


def _problem(length: int, device: torch.device) -> tuple[AttentionMap, tuple[Tensor, ...], Tensor]:
    """A causal map with normed queries and two heads of 16, its tensors, and a cotangent."""
    batch, heads, dim = 2, 2, 16
    random = torch.Generator().manual_seed(0)
    shapes = {"weight": (heads * dim,) * 2, "key": (batch, heads, length, dim), "value": (batch, heads, length, dim)}
    args = {name: torch.randn(shape, generator=random, device="cpu") for name, shape in shapes.items()}
    args["weight"] *= dim**-0.5
    grad = torch.randn(batch, length, heads * dim, generator=random, device="cpu")
    function = AttentionMap(AttentionSpec(dim**-0.5, True), QueryMap(heads, True), True, tuple(args))
    return function, tuple(t.to(device) for t in args.values()), grad.to(device)
