"""Which kernel computes the diagonal blocks of a causal map: torch, or one that is compiled by numba or Triton.

Each of the compiled ones is an engine: a module with a `ForwardKernel` and an `AdjointKernel`, which know nothing of
each other's, and `hindrance`, which says why it cannot compute a map. `diagonal`, in torch, serves every map, and rows
that an engine gives up on are handed to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from implicit_attention import native, triton_blocks
from implicit_attention.causal import cpu
from implicit_attention.causal_system import CausalSystem
from implicit_attention.diagonal import BlockAdjoint
from implicit_attention.errors import Came, bad_value, missing_extra
from implicit_attention.kernels.triton import check_version, misplaced

_WORTH_IT = 8  # rows; preparing a kernel costs more than fewer rows do (a decoded token is one)


class ForwardKernel(Protocol):
    """Settles diagonal blocks in place."""

    def settle(self, rows: slice) -> int:
        """Settle a block's rows up to the first few that want the row solver; the rest is left as it was."""


class AdjointKernel(Protocol):
    """Solves the adjoint of diagonal blocks."""

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; None if it has rows that want another solver."""


@runtime_checkable
class Merger(Protocol):
    """A forward kernel that also merges what comes from below the diagonal."""

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge attention over more columns, `[B, H, r, d]` and `[B, H, r]`, into rows that are not solved yet."""


class Sweeper(Protocol):
    """Sweeps over blocks of many rows, in place; it may go on from one before it knows that it has settled."""

    def check(self) -> None:
        """Raise `Unsettled` if the last block had not settled."""


class ForwardSweeper(Sweeper, Protocol):
    """Settles blocks of many rows in place."""

    def settle(self, rows: slice) -> bool:
        """Settle a block; return whether that has been done. If not, it is as it was."""


class AdjointSweeper(Sweeper, Protocol):
    """Solves the adjoint of blocks of many rows in place.

    Attributes:
        largest: The largest residual so far, `[B]`.
        sweeps: The most sweeps of a block.
        near_singular: Rows that are known to have a gain close to 1.
    """

    largest: Tensor
    sweeps: int
    near_singular: int

    def solve(self, rows: slice, *, exactly: bool) -> bool:
        """Solve a block, the rows' own columns `exactly` or not; return whether that has been done."""


@dataclass(frozen=True)
class _Compiled:
    """What is known about an engine before it is imported.

    Attributes:
        module: Where it is.
        extra: The extra that installs what it needs.
        serves: What it computes, in words.
        hindrance: Why it cannot compute a map, in words; None if it can.
        automatic: Whether "auto" takes it: only what has been run and measured where it is meant for.
    """

    module: str
    extra: str
    serves: str
    hindrance: Callable[[CausalSystem], str | None]
    automatic: bool


_COMPILED = {
    "cpp": _Compiled(
        module="implicit_attention.causal.cpu.engine",
        extra="cpu",
        serves="the layer runs on the CPU in float32 or float64",
        hindrance=cpu.hindrance,
        automatic=False,
    ),
    "numba": _Compiled(
        module="implicit_attention.native.engine",
        extra="cpu",
        serves="the layer runs on the CPU in float32 or float64, without dropout",
        hindrance=native.hindrance,
        automatic=True,
    ),
    "triton": _Compiled(
        module="implicit_attention.triton_blocks.engine",
        extra="gpu",
        serves="the layer runs on a CUDA device, in one dtype and without dropout (with TRITON_INTERPRET=1 in the "
        "environment before the start, Triton's interpreter also serves the CPU, slowly)",
        hindrance=triton_blocks.hindrance,
        automatic=False,
    ),
}
KERNELS = ("auto", "torch", *_COMPILED)


def chosen(kernel: str, system: CausalSystem) -> str:
    """Return which kernel computes the diagonal blocks of a map.

    Args:
        kernel: What is asked for: "auto" takes numba where it is installed, where it serves the map, and where it
            pays; Triton's kernels, which have been measured in part alone, only if they are asked for.
        system: The map.

    Returns:
        "torch", "numba" or "triton".

    Raises:
        ImportError: If a compiled kernel is asked for whose compiler is missing.
        ValueError: If one is asked for that cannot compute the map.
    """
    if kernel == "torch":
        return kernel
    if kernel == "auto":
        return next((name for name, engine in _COMPILED.items() if _pays(name, engine, system)), "torch")
    _check(kernel, _COMPILED[kernel].hindrance(system))
    return kernel


def _check(kernel: str, hindrance: str | None) -> None:
    compiled = _COMPILED[kernel]
    if kernel != "cpp" and find_spec(kernel) is None:
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
    """Return the engine that computes the diagonal blocks of a map, None if torch does.

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
    """Return what sweeps over blocks of many rows, where the chosen kernel has such a thing and it serves the map.

    Args:
        kernel: As in `chosen`.
        system: The map.

    Returns:
        `triton_blocks.sweeps` or None.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    if chosen(kernel, system) != "triton":
        return None
    sweeps = import_module("implicit_attention.triton_blocks.sweeps")
    return sweeps if sweeps.serves(system) else None


def token_kernels(kernel: str, like: Tensor) -> Any:
    """Return what decodes one token per sample in few launches, None if torch does, in many.

    Args:
        kernel: As in `chosen`.
        like: A tensor of the map.

    Returns:
        `triton_blocks.token` or None.

    Raises:
        ImportError: As in `chosen`.
        ValueError: As in `chosen`.
    """
    if kernel != "triton":
        return None
    _check(kernel, misplaced(like))
    return import_module("implicit_attention.triton_blocks.token")
