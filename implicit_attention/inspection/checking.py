"""What plots and reports are given, checked."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.solution import Solution
from implicit_attention.errors import Came, bad_type, bad_value, describe


def check_named(argument: str, given: object, what: str, example: str) -> None:
    """Refuse what is no mapping, or is empty.

    Args:
        argument: Its name in the error.
        given: What was given.
        what: What each name stands for.
        example: A mapping that fits.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If it is empty.
    """
    if not isinstance(given, Mapping):
        raise bad_type(argument, f"a mapping with a name for each {what}", given, f"Such as {example}.")
    if not given:
        raise bad_value(argument, f"at least one {what}", Came("none"))


def check_share(argument: str, given: object) -> None:
    """Refuse what is no number in [0, 1].

    Args:
        argument: Its name in the error.
        given: What was given.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is another number.
    """
    if not isinstance(given, Real):
        raise bad_type(argument, "a number in [0, 1]", given)
    if not 0 <= float(given) <= 1:
        raise bad_value(argument, "a number in [0, 1]", given)


def numbers(argument: str, given: object, shape: str, dims: tuple[int, ...], remedy: str = "") -> Tensor:
    """Return a tensor as one that matplotlib can draw.

    Args:
        argument: Its name in the error.
        given: What was given.
        shape: The shape that fits, in words.
        dims: The numbers of dimensions that fit.
        remedy: What to do about another shape or type.

    Returns:
        The tensor on the host, float64, without gradient.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If its shape does not fit, or it has no entries or complex ones.
    """
    if not isinstance(given, Tensor):
        raise bad_type(argument, f"a tensor of shape {shape}", given, remedy)
    if given.dim() not in dims:
        raise bad_value(argument, f"of shape {shape}", given, remedy)
    if given.is_complex() or not given.numel():
        raise bad_value(argument, "a tensor of real numbers, one at least", given)
    return given.detach().double().cpu()


def residuals(argument: str, given: object) -> Tensor:
    """Return the figures of a curve of residuals.

    Args:
        argument: Its name in the error.
        given: What was given.

    Returns:
        The largest of each step, `[steps]`.

    Raises:
        TypeError: If it is not made of numbers.
        ValueError: If there are fewer than two steps.
    """
    try:
        figures = torch.as_tensor(given.abs_trace if isinstance(given, Solution) else given)
    except (TypeError, ValueError, RuntimeError):
        raise bad_type(argument, "a Solution, a trace of one, or a number for each step", given) from None
    figures = figures.detach().double().cpu()
    if figures.dim() > 1 and figures.numel():
        figures = figures.flatten(1).amax(1)
    if figures.numel() < 2:
        raise bad_value(
            argument, "a figure for each of several steps", Came(f"{figures.numel()}"),
            "A direct solver such as ForwardSubstitution takes no steps that could be drawn: solve with "
            "solver=Picard() or Anderson().",
        )  # fmt: skip
    return figures


def by_step(argument: str, given: object, what: str) -> dict[Any, float]:
    """Return the figures of a curve of training.

    Args:
        argument: Its name in the error.
        given: What was given.
        what: What its figures are.

    Returns:
        The figure at each training step.

    Raises:
        TypeError: If it is no mapping of numbers to numbers.
    """
    expected = f"a mapping with {what} for each training step"
    if not isinstance(given, Mapping):
        raise bad_type(argument, expected, given, "Such as {100: 0.5}.")
    curve = {}
    for step, figure in given.items():
        if not isinstance(step, Real):
            raise bad_type(argument, expected, Came(f"the step {describe(step)}"), "Make a number of it: int(step).")
        if isinstance(figure, Tensor) and figure.numel() == 1:
            figure = figure.item()
        if not isinstance(figure, Real):
            raise bad_type(f"{argument}[{step}]", "a number", figure)
        curve[step] = float(figure)
    return curve


def token_labels(given: Any, count: int) -> tuple[str, ...]:
    """Return the labels of tokens.

    Args:
        given: What was given for them.
        count: Number of tokens.

    Raises:
        TypeError: If a label is no string.
        ValueError: If there are more labels than tokens, or fewer.
    """
    try:
        labels = tuple(given)
    except TypeError:
        labels = (given,)
    for label in labels:
        if not isinstance(label, str):
            raise bad_type("tokens", "labels that are strings", label, "Make strings of numbers with str(number); a "
                           "tensor gives its numbers as .tolist().")  # fmt: skip
    if len(labels) != count:
        raise bad_value("tokens", f"{count} labels", Came(f"{len(labels)}"))
    return labels


def labels_of(maps: Mapping[str, Tensor], tokens: object) -> tuple[str, ...]:
    """Return the labels of the tokens that all attention matrices are about.

    Args:
        maps: The matrices by title, `[..., N, N]`.
        tokens: What was given for the labels.

    Raises:
        TypeError: If a label is no string.
        ValueError: If a matrix is not square, or of another size.
    """
    labels: tuple[str, ...] = ()
    for title, weights in maps.items():
        rows, columns = weights.shape[-2:]
        if rows != columns:
            came = Came(f"labels, and maps[{title!r}] of shape [{rows}, {columns}]")
            raise bad_value("tokens", "None for maps that are not square", came, "Or label `axes` of the figure.")
        labels = token_labels(tokens, rows)
    return labels
