"""Layers whose outputs are all the same vector, and what is said of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_attention.attention.positions import Positions
from implicit_attention.equation import Equation
from implicit_attention.equation.packing import PackedMap
from implicit_attention.equation.projection import Layer
from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.errors import CollapseWarning
from implicit_attention.inputs import Inputs
from implicit_attention.settings import Settings

ALIKE = 3e-2  # difference of outputs, in units of that of the values, below which they are the same vector


def watch(layer: Layer, inputs: Inputs, equation: Equation, value: Tensor, report: FailureReport) -> None:
    """Watch for collapse; packed documents each for itself.

    Args:
        layer: The layer.
        inputs: Of the call.
        equation: That was solved.
        value: The equilibrium, `[B, N, D]`.
        report: Says it.
    """
    function = equation.function
    if not isinstance(function, PackedMap):
        tokens = equation.start if inputs.start is None else function.values(equation.args)
        watch_for_collapse(layer.settings, layer.positions, inputs, tokens, value, report)
        return
    starts, values = function.packing.unpack(equation.start), function.packing.unpack(value)
    for own, start, found in zip(function.packing.unpack_inputs(inputs), starts, values, strict=True):
        watch_for_collapse(layer.settings, layer.positions, own, start, found, report)


def watch_for_collapse(
    settings: Settings, positions: Positions | None, inputs: Inputs, start: Tensor, value: Tensor, report: FailureReport
) -> None:
    """Warn once of a layer all of whose outputs are the same vector though its values differ.

    That is an equilibrium of every layer without a causal mask whose queries see nothing but outputs: if all outputs
    agree, so do all queries. With the softmax over queries the weights are then uniform, and `Omega_Q` and `W_K` get no
    gradient. Layers with a mask, positions or `query_input=True` are not watched; those with `max_gain` only outside of
    compiled graphs, which hold them whole.

    Args:
        settings: Of the layer.
        positions: Of the layer.
        inputs: Of the call.
        start: The values of its tokens, `[B, N, D]`.
        value: Its equilibrium, `[B, N, D]`.
        report: Says it.
    """
    apart = positions is not None or inputs.attn_mask is not None
    if not can_collapse(settings, start, apart) or not start.numel() or maps.transforms_active():
        return
    if torch.compiler.is_compiling() and settings.max_gain is not None:
        return
    padding, sentence = inputs.key_padding_mask if inputs.context is None else None, _COLLAPSED[settings.rows_are_keys]
    look: Callable[..., None] = _look
    if torch.compiler.is_compiling():  # these solves are no part of a compiled graph either
        look = torch.compiler.disable(_look)  # type: ignore[no-untyped-call]
    look(start, value, padding, sentence, report)


def can_collapse(settings: Settings, start: Tensor, apart: bool) -> bool:
    """Return whether equal outputs mean equal queries, so that the outputs of a layer can become one vector.

    Args:
        settings: Of the layer.
        start: The values of its tokens, `[B, N, D]`.
        apart: Whether positions or a mask set tokens apart.
    """
    return start.shape[1] > 1 and not (settings.is_causal or settings.query_input or apart)


def _look(start: Tensor, value: Tensor, padding: Tensor | None, sentence: str, report: FailureReport) -> None:
    if not report.said(CollapseWarning) and collapsed(start, value, padding):
        report.once(sentence, CollapseWarning)


_COLLAPSED = {
    True: "every output is the mean of the values, so all weights are uniform, and Omega_Q and W_K get no gradient. "
    'Make the layer with query_input=True, is_causal=True or positions="rope".',
    False: "every token gets the same output, because all rows pose the same equation. Make the layer with "
    "query_input=True.",
}


@torch.no_grad()
def collapsed(start: Tensor, value: Tensor, padding: Tensor | None) -> bool:
    """Return whether the outputs of every sample are one vector, though what they started from differs.

    Args:
        start: The values of all tokens, `[B, N, D]`.
        value: The outputs, `[B, N, D]`.
        padding: `[B, N]`: hidden tokens, whose values do not count.
    """
    few = value[:, [0, value.shape[1] // 2, -1]]  # in a layer at work they differ, and nothing else is looked at
    if not value.numel() or not _differ(few, start).logical_not().all():
        return False
    if padding is not None:
        if padding.dtype != torch.bool:
            return False
        seen = start.gather(1, padding.long().argmin(1)[:, None, None].expand(-1, 1, start.shape[2]))
        start = torch.where(padding[..., None], seen, start)  # hidden tokens repeat the first that is not
    spread = (start.amax(1) - start.amin(1)).amax(1)
    telling = spread > ALIKE * start.abs().amax((1, 2))  # beyond rounding: equal values give equal outputs rightly
    return bool((telling & ~_differ(value, start)).any() and not (telling & _differ(value, start)).any())


def _differ(value: Tensor, start: Tensor) -> Tensor:
    """Whether outputs of a sample differ, `[B]`."""
    return (value.amax(1) - value.amin(1)).amax(1) > ALIKE * (start.amax(1) - start.amin(1)).amax(1)
