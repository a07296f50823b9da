"""The compiled library as Python sees it: its structs, field by field as in `csrc/arguments.h`, and its functions."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from implicit_attention.causal.cpu.build import NAME, fingerprint

PATH = Path(os.environ.get("IMPLICIT_ATTENTION_CPU_LIBRARY", Path(__file__).parent / NAME))  # one with sanitizers, say
VARIABLE = "IMPLICIT_ATTENTION_CPU_CAPABILITY"
_DONE, _WRONG_STRUCT = 0, 1


def _fields(pointers: str, numbers: str, text: str) -> list[tuple[str, Any]]:
    """The fields of a struct in their order; those in `pointers` and `numbers` are what they say, others integers."""
    kinds = dict.fromkeys(pointers.split(), ctypes.c_void_p) | dict.fromkeys(numbers.split(), ctypes.c_double)
    return [(name, kinds.get(name, ctypes.c_int64)) for name in text.split()]


_SIZES = "bytes threads batch heads groups length dim first stop"
_KEYS_AND_VALUES = "key key_b key_h key_n value value_b value_g value_n"
_MASKS = "own_score bias bias_b bias_h keep"


class ForwardArguments(ctypes.Structure):
    """`ForwardArguments`, of either type."""

    _fields_ = _fields(
        "key value weight constant added cosine sine own_score bias keep y lse query inverse norm_weight residual "
        "size sweeps before_y before_lse settled",
        "scale eps rtol atol same_root slow",
        f"{_SIZES} {_KEYS_AND_VALUES} weight constant added cosine sine turn_b {_MASKS} y lse query inverse "
        "norm_weight residual size sweeps before_y before_lse settled scale eps rtol atol same_root slow",
    )


class AdjointArguments(ctypes.Structure):
    """`AdjointArguments`, of either type."""

    _fields_ = _fields(
        "key value weight cosine sine own_score bias keep y lse query inverse norm_weight normed grad later allowed "
        "lam made d_key d_value own_slope slope residual gain suspect sweeps solved",
        "scale norm near_singular",
        f"{_SIZES} {_KEYS_AND_VALUES} weight cosine sine turn_b {_MASKS} y lse query inverse norm_weight normed grad "
        "grad_b grad_n grad_h later allowed lam made d_key d_value own_slope slope residual gain suspect sweeps solved "
        "scale norm near_singular",
    )


_BOTH = f"{_SIZES} {_KEYS_AND_VALUES} weight"


class FeedbackForwardArguments(ctypes.Structure):
    """`FeedbackForwardArguments`, of either type."""

    _fields_ = _fields(
        "key value weight constant added cosine sine own_score bias keep feedback feedback_bias y lse query inverse "
        "seen",
        "scale eps",
        f"{_BOTH} constant added cosine sine turn_b {_MASKS} feedback feedback_bias normed y lse query inverse seen "
        "scale eps",
    )


class FeedbackAdjointArguments(ctypes.Structure):
    """`FeedbackAdjointArguments`, of either type."""

    _fields_ = _fields(
        "key value weight cosine sine own_score bias keep feedback y lse query inverse seen grad d_query d_seen lam "
        "made d_key d_own_value own_slope slope",
        "scale eps",
        f"{_BOTH} cosine sine turn_b {_MASKS} feedback normed y lse query inverse seen grad grad_b grad_n grad_h "
        "d_query d_seen lam made d_key d_own_value own_slope slope scale eps",
    )


Arguments = ForwardArguments | AdjointArguments | FeedbackForwardArguments | FeedbackAdjointArguments
_KERNELS = {
    "forward": ForwardArguments,
    "adjoint": AdjointArguments,
    "feedback_forward": FeedbackForwardArguments,
    "feedback_adjoint": FeedbackAdjointArguments,
}


@cache
def load() -> ctypes.CDLL:
    """Load the library, give it torch's threads, and choose the instruction set.

    Returns:
        The library.

    Raises:
        ImportError: If it has not been built, or from other sources.
        OSError: If it cannot be loaded.
        RuntimeError: If the environment asks for an instruction set that the processor does not have.
    """
    if not PATH.exists():
        raise ImportError(f"The CPU kernels are not built: {PATH} is missing.")
    library = ctypes.CDLL(str(PATH))
    sources = getattr(library, "implicit_attention_sources", None)
    if sources is not None:
        sources.restype = ctypes.c_char_p
    if fingerprint() not in (None, sources and sources().decode()):
        raise ImportError(f"{PATH} was built from other sources than those beside it.")
    library.implicit_attention_use_threads.argtypes = [ctypes.c_void_p]
    library.implicit_attention_use_threads.restype = None
    library.implicit_attention_capability.restype = ctypes.c_char_p
    for name, arguments in _KERNELS.items():
        for bits in (32, 64):
            function = getattr(library, f"implicit_attention_{name}{bits}")
            function.argtypes = [ctypes.POINTER(arguments)]
            function.restype = ctypes.c_int32
    library.implicit_attention_use_threads(_parallel_for())
    wanted = os.environ.get(VARIABLE)
    if wanted and not library.implicit_attention_use_capability(wanted.encode()):
        raise RuntimeError(
            f"{VARIABLE}={wanted}: the processor does not have it, or there is no such set of instructions."
        )
    return library


def capability() -> str:
    """Return the instruction set in use: "baseline", "avx2" or "avx512"."""
    name: bytes = load().implicit_attention_capability()
    return name.decode()


def call(name: str, arguments: Arguments) -> None:
    """Call a kernel.

    Args:
        name: "forward", "adjoint", "feedback_forward" or "feedback_adjoint", then 32 or 64.
        arguments: Its arguments.

    Raises:
        RuntimeError: If this file and the library disagree about the arguments, or there is no memory.
    """
    status = getattr(load(), f"implicit_attention_{name}")(ctypes.byref(arguments))
    if status == _WRONG_STRUCT:
        raise RuntimeError(f"{PATH} was built from other sources than {__file__}: build it again.")
    if status != _DONE:
        raise RuntimeError("The CPU kernels had no memory for their scratch.")


def _parallel_for() -> int | None:
    """The address of torch's own parallel loop; None where this torch does not export it (before 2.10)."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None
