"""The choice of the engine that computes the diagonal blocks of a causal map: torch, or a compiled one.

A compiled engine is a module with a `ForwardKernel` and an `AdjointKernel`. Its room has a function `hindrance`, which
says why the engine cannot compute a map. Engines do not import each other. `diagonal`, in torch, serves every map; rows
that a compiled engine gives up on go to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from implicit_attention.causal import numba, triton
from implicit_attention.causal.diagonal import BlockAdjoint
from implicit_attention.causal.system import CausalSystem
from implicit_attention.errors import Came, bad_value, missing_extra
from implicit_attention.triton_available import check_version, misplaced

_WORTH_IT = 8  # rows; with fewer (a decoded token is one) preparing a compiled kernel costs more than it saves


class ForwardKernel(Protocol):
    """Settles diagonal blocks in place."""

    def settle(self, rows: slice) -> int:
        """Settle rows up to the first that the kernel gives up on, and return that row; later rows are unchanged."""


class AdjointKernel(Protocol):
    """Solves the adjoint of diagonal blocks."""

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; None if the kernel gives up on one of its rows."""


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
class _Compiled:
    """The description of an engine, known before it is imported.

    Attributes:
        module: Its module.
        extra: The extra that installs its dependencies.
        serves: Which maps it computes, in words.
        hindrance: Returns why it cannot compute a map, in words; None if it can.
        automatic: Whether "auto" may take it: only if it has been measured on its device.
    """

    module: str
    extra: str
    serves: str
    hindrance: Callable[[CausalSystem], str | None]
    automatic: bool


_COMPILED = {
    "numba": _Compiled(
        module="implicit_attention.causal.numba.engine",
        extra="cpu",
        serves="the layer runs on the CPU in float32 or float64, without dropout",
        hindrance=numba.hindrance,
        automatic=True,
    ),
    "triton": _Compiled(
        module="implicit_attention.causal.triton.engine",
        extra="gpu",
        serves="the layer runs on a CUDA device, in one dtype and without dropout (with TRITON_INTERPRET=1 in the "
        "environment before the start, Triton's interpreter also serves the CPU, slowly)",
        hindrance=triton.hindrance,
        automatic=False,
    ),
}
KERNELS = ("auto", "torch", *_COMPILED)


def chosen(kernel: str, system: CausalSystem) -> str:
    """Return the name of the engine that computes the diagonal blocks of a map.

    Args:
        kernel: The setting. "auto" takes numba if it is installed, serves the map, and the map is long enough. Triton's
            kernels are measured in part only, so they have to be asked for.
        system: The map.

    Returns:
        "torch", "numba" or "triton".

    Raises:
        ImportError: If the engine's compiler is not installed.
        ValueError: If the engine cannot compute the map.
    """
    if kernel == "torch":
        return kernel
    if kernel == "auto":
        return next((name for name, engine in _COMPILED.items() if _pays(name, engine, system)), "torch")
    _check(kernel, _COMPILED[kernel].hindrance(system))
    return kernel


def _check(kernel: str, hindrance: str | None) -> None:
    compiled = _COMPILED[kernel]
    if find_spec(kernel) is None:
        raise missing_extra(f"kernel={kernel!r}", kernel, compiled.extra)
    if kernel == "triton":
        check_version(f"kernel={kernel!r}")
    if hindrance:
        expected = f'"auto" or "torch" unless {compiled.serves}'
        raise bad_value("kernel", expected, Came(f'"{kernel}" where {hindrance}'))


def _pays(name: str, engine: _Compiled, system: CausalSystem) -> bool:
    return (
        engine.automatic
        and system.length >= _WORTH_IT
        and engine.hindrance(system) is None
        and find_spec(name) is not None
    )


def engine(kernel: str, system: CausalSystem) -> Any:
    """Return the module of the engine that computes the diagonal blocks of a map, None for torch.

    Args:
        kernel: As in `chosen`.
        system: The map.

    Returns:
        The module.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    name = chosen(kernel, system)
    return None if name == "torch" else import_module(_COMPILED[name].module)


def sweeper(kernel: str, system: CausalSystem) -> Any:
    """Return the module that sweeps over blocks of many rows, None if the engine has none that serves the map.

    Args:
        kernel: As in `chosen`.
        system: The map.

    Returns:
        `causal.triton.sweeps` or None.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    if chosen(kernel, system) != "triton":
        return None
    sweeps = import_module("implicit_attention.causal.triton.sweeps")
    return sweeps if sweeps.serves(system) else None


def token_kernels(kernel: str, like: Tensor) -> Any:
    """Return the module that decodes one token per sample in few launches, None for torch, which takes many.

    Args:
        kernel: As in `chosen`.
        like: A tensor of the map.

    Returns:
        `causal.triton.token` or None.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    if kernel != "triton":
        return None
    _check(kernel, misplaced(like))
    return import_module("implicit_attention.causal.triton.token")
