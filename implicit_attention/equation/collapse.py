"""Outputs that are all the same vector, or all zero since a mask hides everything, and what is said of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_attention.attention.positions import Positions
from implicit_attention.equation import Equation
from implicit_attention.equation.packing import PackedMap
from implicit_attention.equation.projection import Layer
from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.outside_graphs import outside_graphs
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.errors import CollapseWarning
from implicit_attention.inputs import HIDDEN, Inputs
from implicit_attention.settings import Settings

_FIRST = 3  # calls of a layer in which its masks are looked at: a mask that is meant otherwise shows at once
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
        look = outside_graphs(_look, "Whether all outputs are one vector is read on the host.", _APART)
    look(start, value, padding, sentence, report)


def watch_masks(settings: Settings, inputs: Inputs, report: FailureReport) -> None:
    """Warn once, in a layer's first calls, of a mask that hides every token from every row, so that outputs are 0.

    Most likely it is meant the other way round: True hides here and in `nn.MultiheadAttention`, but means "keep" in
    Hugging Face's `attention_mask` and PyTorch's `scaled_dot_product_attention`. Calls with a cache are not watched,
    since a piece of a padded prompt may be all padding; compiled graphs are not either.

    Args:
        settings: Of the layer.
        inputs: Of the call.
        report: Says it.
    """
    if torch.compiler.is_compiling() or maps.transforms_active() or inputs.cache is not None or report.calls > _FIRST:
        return
    for name in ("key_padding_mask", "attn_mask"):
        mask: Tensor | None = getattr(inputs, name)
        if mask is None or not mask.numel() or report.said(UserWarning):
            continue
        hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
        if name == "attn_mask" and settings.is_causal:
            hidden = hidden | torch.ones_like(hidden).triu(1)
        if hidden.all():
            meaning = _TRUE_HIDES if mask.dtype == torch.bool else _LOW_HIDES
            report.once(_ALL_HIDDEN.format(name) + meaning.format(name), UserWarning)


_ALL_HIDDEN = "`{}` hides every token from every row, so all outputs are 0 before out_proj. "
_TRUE_HIDES = "True hides, as in nn.MultiheadAttention. If yours says what to keep, give ~{}."
_LOW_HIDES = f"A float mask is added to the scores, and hides where it is {HIDDEN:g} or less."


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


_APART = "Or make the layer with query_input=True and max_gain=0.9."
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
