"""The errors and warnings of the package, and their common sentence.

A message names the argument, what was expected, what came, and what to do.
"""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from reprlib import Repr
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_INSIDE = ("implicit_attention", "torch")  # what a warning does not point into
_LONGEST = 100  # characters of a value that a message holds
_BRIEF = Repr()
_BRIEF.maxlevel = 1
_BRIEF.maxstring = _BRIEF.maxother = _LONGEST


class ConvergenceWarning(UserWarning):
    """An equilibrium or its adjoint was not solved to tolerance."""


class CollapseWarning(UserWarning):
    """All outputs of a sample are the same vector: the layer is at an equilibrium that hardly trains."""


class ConvergenceError(RuntimeError):
    """As `ConvergenceWarning`, raised with `on_failure="raise"`."""


NOT_FINITE = "the equation gave NaN or Inf: look for them in the inputs, or for weights that overflow"


class NonFiniteError(ValueError):
    """A map or a layer gave NaN or Inf. The cause is in its inputs or parameters, not in the solver."""


def describe(value: object) -> str:
    """Return a short description of a value for an error message: type, shape, dtype, device."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"an array of shape {shape} ({kind})"
    text = repr(value)
    return f"{text if len(text) <= _LONGEST else _BRIEF.repr(value)} ({kind})"


class Came(str):
    """A description of what came, in words: `bad_value` prints it as it is."""


# Remedies where a module or parameter of a layer was exchanged.
FITTING = "What is put in its place has the same sizes."
OTHER_OPTIONS = "Make the layer with other options instead."


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bad_value(argument: str, expected: str, got: object, remedy: str = "") -> ValueError:
    """Return the `ValueError` for an argument with a value that cannot work."""
    return ValueError(_sentence(argument, expected, got, remedy))


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """Return the question for a name that is not known, with a space after it; "" if it is like none that is known."""
    near = get_close_matches(given, names, n=1) if isinstance(given, str) else ()
    return "".join(f"Did you mean `{name}`? " for name in near)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called into this package or into torch, whatever the depth of the call.

    Args:
        message: What is said.
        category: Of the warning.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=2 if frame is None else level)


def missing_extra(what: str, package: str, extra: str) -> ImportError:
    """Return the `ImportError` for a package that an extra installs."""
    return ImportError(f"{what} needs {package}: pip install 'implicit-attention[{extra}]'")


def bad_type(argument: str, expected: str, got: object, remedy: str = "") -> TypeError:
    """Return the `TypeError` for an argument with a type that cannot work."""
    return TypeError(_sentence(argument, expected, got, remedy))


def _sentence(argument: str, expected: str, got: object, remedy: str) -> str:
    came = got if isinstance(got, Came) else describe(got)
    text = f"`{argument}` must be {expected}, but got {came}."
    return f"{text} {remedy}" if remedy else text


def check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise bad_value(argument, f"one of {', '.join(map(repr, choices))}", value)


def check_positive(argument: str, value: Any, *, integer: bool = False, zero: bool = False) -> None:
    """Raise a `TypeError` or `ValueError` unless `value` is a finite number above zero, or zero if `zero` is true."""
    kind = "an integer" if integer else "a number"
    types = (int,) if integer else (int, float)
    bound = ">= 0" if zero else "> 0"
    if isinstance(value, bool) or not isinstance(value, types):
        raise bad_type(argument, f"{kind} {bound}", value)
    if not (value >= 0 if zero else value > 0) or value == float("inf"):
        raise bad_value(argument, f"{kind} {bound}" + ("" if integer else " and finite"), value)


def first_non_finite(named: dict[str, Tensor | None]) -> str | None:
    """Return a sentence about the first tensor that holds NaN or Inf, or None if all tensors are finite.

    A tensor whose name ends in "mask" may hold -Inf, which hides an entry.
    """
    for name, tensor in named.items():
        if tensor is not None and tensor.is_floating_point() and not tensor.is_meta:
            tensor = _unwrapped(tensor)
            fine = torch.isfinite(tensor) | (torch.isneginf(tensor) if name.endswith("mask") else False)
            bad = int((~fine).sum())
            if bad:
                return f"`{name}` holds {bad} NaN or Inf of {tensor.numel()} entries"
    return None


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor with its numbers, the samples of `torch.func.vmap` among its dimensions."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf. A finite sum shows it in one pass; an infinite one may not."""
    return isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


READS_NUMBERS = (torch.Tag.cudagraph_unsafe,)  # tags of operators that a CUDA graph cannot hold


def required(value: Tensor, holds: Tensor, message: str) -> Tensor:
    """Return a tensor, or raise unless a condition holds.

    A graph that uses what it returns checks the condition whenever it runs. Not checked under `torch.func` transforms,
    which have no numbers to look at.

    Args:
        value: The tensor.
        holds: The condition, a bool tensor without dimensions.
        message: Of the error.

    Returns:
        `value`.

    Raises:
        ValueError: If it does not hold; from a compiled or exported graph when it runs.
    """
    if torch._C._are_functorch_transforms_active():
        return value
    if torch.compiler.is_compiling():
        # The compiler drops an operator whose result is not used.
        return torch.where(_require(holds, message), value, value.new_zeros(()))
    if not bool(holds):
        raise ValueError(message)
    return value


@torch.library.custom_op("implicit_attention::require", mutates_args=(), tags=READS_NUMBERS)
def _require(holds: Tensor, message: str) -> Tensor:
    if not bool(holds):
        raise ValueError(message)
    return holds.clone()


@_require.register_fake
def _(holds: Tensor, message: str) -> Tensor:
    return torch.empty_like(holds)
