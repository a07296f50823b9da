"""Which engine computes the diagonal blocks of a causal map: C++ on the CPU, Triton on CUDA devices, or torch.

An engine is a module with a `ForwardKernel` and an `AdjointKernel`, which know nothing of another engine's. `diagonal`,
in torch, serves every map on every device; rows that an engine gives up on are handed to it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from implicit_attention.causal import cpu, self_test, triton
from implicit_attention.causal.diagonal_adjoint import BlockAdjoint
from implicit_attention.causal.system import CausalSystem
from implicit_attention.equilibrium.triton_available import check_version
from implicit_attention.errors import Came, bad_value, missing_extra, warn

_LOG = logging.getLogger("implicit_attention")


class ForwardKernel(Protocol):
    """Settles diagonal blocks in place."""

    def settle(self, rows: slice) -> int:
        """Settle rows up to the first that the kernel gives up on, and return that row; later rows are unchanged."""


class AdjointKernel(Protocol):
    """Solves the adjoint of diagonal blocks."""

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; None if the kernel gives up on one of its rows."""


class Engine(Protocol):
    """What computes diagonal blocks.

    Attributes:
        ForwardKernel: Makes a `ForwardKernel` for a map.
        AdjointKernel: Makes an `AdjointKernel` for a map.
        KEEPS_SLOPES: Whether the adjoint can return the cotangents of all scores, which gradients of biases need.
    """

    ForwardKernel: Callable[..., ForwardKernel]
    AdjointKernel: Callable[..., AdjointKernel]
    KEEPS_SLOPES: bool

    def widest(self, system: CausalSystem, block: int) -> int:
        """Return how many rows one call should take, at least `block`."""


@runtime_checkable
class Merger(Protocol):
    """A forward kernel that also merges attention from below the diagonal."""

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge attention over more columns, `[B, H, r, d]` and `[B, H, r]`, into rows that are not solved yet."""


class Sweeper(Protocol):
    """Sweeps over blocks of many rows, in place. It may start a block before it knows that the last one settled."""

    def check(self) -> None:
        """Raise `Unsettled` if the last block did not settle."""


class ForwardSweeper(Sweeper, Protocol):
    """Settles blocks of many rows in place."""

    def settle(self, rows: slice) -> bool:
        """Settle a block and return whether it settled; otherwise it is unchanged."""


class AdjointSweeper(Sweeper, Protocol):
    """Solves the adjoint of blocks of many rows in place.

    Attributes:
        largest: The largest residual so far, `[B]`.
        sweeps: The largest number of sweeps of a block.
        near_singular: Number of rows known to have a gain close to 1.
    """

    largest: Tensor
    sweeps: int
    near_singular: int

    def solve(self, rows: slice, *, exactly: bool) -> bool:
        """Solve a block, with own columns solved `exactly` or swept, and return whether it was solved."""


@dataclass(frozen=True)
class _Known:
    """What is known about an engine before it is imported.

    Attributes:
        module: Where it is.
        serves: What it computes, in words.
        hindrance: Why it cannot compute a map, in words; None if it can.
        missing: The error to raise if what it needs is not installed; None if it is.
        automatic: The type of the devices on which "auto" takes it.
        tested: Whether it must have passed its self-test on the device before.
    """

    module: str
    serves: str
    hindrance: Callable[[CausalSystem], str | None]
    missing: Callable[[], ImportError | None]
    automatic: str
    tested: bool = False


def _missing_cpp() -> ImportError | None:
    problem = cpu.problem()
    return None if problem is None else ImportError(f"kernel='cpp': {problem}")


def _missing_triton() -> ImportError | None:
    if find_spec("triton") is None:
        return missing_extra("kernel='triton'", "triton", "gpu")
    try:
        check_version("kernel='triton'")
    except ImportError as error:
        return error
    return None


_ENGINES = {
    "cpp": _Known(
        module="implicit_attention.causal.cpu.engine",
        serves="the layer runs on the CPU in one dtype",
        hindrance=cpu.hindrance,
        missing=_missing_cpp,
        automatic="cpu",
    ),
    "triton": _Known(
        module="implicit_attention.causal.triton.engine",
        serves="the layer runs on a CUDA device, in one dtype and without dropout (with TRITON_INTERPRET=1 in the "
        "environment before the start, Triton's interpreter also serves the CPU, slowly)",
        hindrance=triton.hindrance,
        missing=_missing_triton,
        automatic="cuda",
        tested=True,
    ),
}
KERNELS = ("auto", "torch", *_ENGINES)
RENAMED = {"numba": "cpp"}  # what 0.1.0 called the compiled kernels of the CPU


def chosen(kernel: str, system: CausalSystem, solve: self_test.Solve) -> str:
    """Return which engine computes the diagonal blocks of a map.

    Args:
        kernel: What is asked for. "auto" takes the C++ kernels on the CPU and Triton's on CUDA devices where they pass
            their self-test, and torch where neither serves the map.
        system: The map.
        solve: What the self-test solves with.

    Returns:
        "torch", "cpp" or "triton".

    Raises:
        ImportError: If an engine is asked for that is not installed.
        ValueError: If one is asked for that cannot compute the map.
    """
    if kernel == "torch":
        return kernel
    if kernel == "auto":
        return next((name for name in _ENGINES if _serves(name, system, solve)), "torch")
    _check(kernel, _hindrance(kernel, system))
    return kernel


def _hindrance(kernel: str, system: CausalSystem) -> str | None:
    """Why an engine cannot compute a map, in words; None if it can."""
    if any(type(t) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(t) for t in system.args):
        return "a tensor is made of other tensors"  # and has no memory that a kernel could read
    return _ENGINES[kernel].hindrance(system)


def _check(kernel: str, hindrance: str | None) -> None:
    known = _ENGINES[kernel]
    missing = known.missing()
    if missing is not None:
        raise missing
    if hindrance:
        others = ", ".join(f'"{name}"' for name in ("auto", "torch", *_ENGINES) if name != kernel)
        expected = f"one of {others} unless {known.serves}"
        raise bad_value("kernel", expected, Came(f'"{kernel}" where {hindrance}'))


def _serves(name: str, system: CausalSystem, solve: self_test.Solve) -> bool:
    device = system.key.device
    apt = device.type == _ENGINES[name].automatic and _hindrance(name, system) is None
    return apt and _works(name, device, solve)


def _works(name: str, device: torch.device, solve: self_test.Solve) -> bool:
    """Whether an engine is here and passes its self-test; the user is told once if not."""
    missing = _ENGINES[name].missing()
    if missing is not None:
        _say_once(str(missing))
        return False
    wrong = self_test.verdict(name, device, solve) if _ENGINES[name].tested else None
    if wrong is not None:
        _warn_once(name, device, wrong)
    return wrong is None


@cache
def _say_once(missing: str) -> None:
    _LOG.warning("%s Until then torch computes the diagonal blocks, several times slower.", missing)


@cache
def _warn_once(name: str, device: torch.device, wrong: str) -> None:
    warn(
        f'kernel="auto": the {name} kernels fail their self-test on {device} ({wrong}), so torch computes causal '
        "layers there, several times slower. The next process tests them again.",
        RuntimeWarning,
    )


def engine(name: str) -> Engine | None:
    """Return an engine that `chosen` has named, None for torch."""
    found: Any = None if name == "torch" else import_module(_ENGINES[name].module)
    return found  # type: ignore[no-any-return]


def feedback_engine(name: str) -> Any:
    """Return the module that computes blocks of a map whose values read outputs.

    Args:
        name: As `chosen` returned it.

    Returns:
        `causal.cpu.feedback`; None if torch computes them.
    """
    return import_module("implicit_attention.causal.cpu.feedback") if name == "cpp" else None


def states(solve: self_test.Solve) -> dict[str, str]:
    """Return, for each engine, whether it can be used on this machine and by whom, in words.

    Args:
        solve: As in `chosen`.

    Returns:
        Names and states.
    """
    found = {"torch": "ready: every map on every device; what the others are checked against"}
    for name, known in _ENGINES.items():
        missing = known.missing()
        here = known.automatic != "cuda" or torch.cuda.is_available()
        if missing is not None:
            found[name] = f"not here: {missing}"
        elif not here:
            found[name] = f"not here: torch finds no CUDA device. It is taken where {known.serves}"
        else:
            device = (
                torch.device("cuda", torch.cuda.current_device()) if known.automatic == "cuda" else torch.device("cpu")
            )
            wrong = self_test.verdict(name, device, solve) if known.tested else None
            asked = "taken" if wrong is None else f"fails its self-test on {device} ({wrong}), so not taken"
            found[name] = f'ready, {asked} by kernel="auto", where {known.serves}'
    return found


def rows_of_block(name: str, system: CausalSystem, block: int) -> int:
    """Return how many rows a diagonal block has, at most `block`.

    Fewer rows settle in fewer sweeps, of which each starts as many operations. On a CPU those of a large batch are long
    enough to hide it.

    Args:
        name: An engine that `chosen` has named.
        system: The map.
        block: The most rows.
    """
    if name == "torch" and system.key.device.type == "cpu":
        block = min(block, max(16, 128 // max(1, system.batch)))
    return min(block, system.length)


def sweeper(name: str, system: CausalSystem, block: int) -> tuple[Any, int]:
    """Return the module that sweeps over blocks of many rows, and the rows of the first blocks.

    Args:
        name: An engine that `chosen` has named.
        system: The map.
        block: Rows of the blocks without it.

    Returns:
        `causal.triton.sweeps` and its rows; None and `block` if the engine has none that serves the map.
    """
    sweeps: Any = None
    if name == "triton" and system.length > block:
        sweeps = import_module("implicit_attention.causal.triton.sweeps")
    if sweeps is None or not sweeps.serves(system):
        return None, block
    return sweeps, max(block, sweeps.widest(system.length))


def token_kernels(kernel: str, key: Tensor, heads: int, solve: self_test.Solve) -> Any:
    """Return the module that decodes one token per sample in few launches, None for torch, which takes many.

    Args:
        kernel: As in `chosen`.
        key: The tokens' keys, `[..., H d]`.
        heads: H.
        solve: As in `chosen`.

    Returns:
        `causal.triton.token` or None.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    if kernel == "auto":
        apt = key.device.type == _ENGINES["triton"].automatic and not triton.decode_hindrance(key, heads)
        if not (apt and _works("triton", key.device, solve)):
            return None
    elif kernel == "triton":
        _check(kernel, triton.decode_hindrance(key, heads))
    else:
        return None
    return token_module("triton")


def token_module(name: str) -> Any:
    """Return the module that decodes with an engine.

    Args:
        name: As `chosen` returned it.

    Returns:
        `causal.triton.token`; None if the engine has none.
    """
    return import_module("implicit_attention.causal.triton.token") if name == "triton" else None
