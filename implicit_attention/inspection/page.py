"""A report as one file for a browser, drawn by Bokeh: nothing is loaded, and nothing is sent.

Bokeh rather than Plotly: its script is a quarter of the size, and its images take arrays of bytes as they are. Its
figures are drawn here; `page.js` changes their data when a reader picks a layer, a head, an iteration or a token.

A map of more than 128 tokens is shown in cells of several tokens: the mean over their rows of the weight that falls on
their columns together. The largest weights of each token come along exactly. All arrays are one compressed block.
"""

import gzip
import json
import math
from base64 import b64encode
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.errors import Came, bad_value, missing_extra
from implicit_attention.inspection.records import SETTLED, LayerReport

if TYPE_CHECKING:
    from bokeh.plotting import figure

_CELLS = 128  # of a map, across
_TOP = 4  # weights of a token that come along exactly, to 1 / 65535
_BY_TOKEN = ("gain", "fold", "steps", "residual", "other_start")
_SMALL: dict[str, Any] = {
    "height": 240, "sizing_mode": "stretch_width", "toolbar_location": None, "tools": "",
    "background_fill_alpha": 0, "border_fill_alpha": 0, "outline_line_color": None,
}  # fmt: skip


def page(layers: tuple[LayerReport, ...], tokens: tuple[str, ...], title: str) -> str:
    """Return the page.

    Args:
        layers: Reports of layers with as many tokens.
        tokens: Labels of the tokens.
        title: Of the page.

    Returns:
        HTML.

    Raises:
        ImportError: If bokeh is missing.
        ValueError: If layers have different numbers of tokens.
    """
    try:
        from bokeh.embed import file_html
        from bokeh.resources import INLINE
    except ModuleNotFoundError as error:
        raise missing_extra("a page", "bokeh", "report") from error
    count = len(tokens)
    for layer in layers:
        if len(layer.gain) != count:
            raise bad_value("layers", f"layers of {count} tokens", Came(f"{layer.name} of {len(layer.gain)}"),
                            "Choose some with layers=[...].")  # fmt: skip
    arrays = _Arrays()
    meta = {
        "tokens": [_visible(token) for token in tokens],
        "settled": all(layer.settles for layer in layers),
        "layers": [_layer(layer, i, arrays, _longest(layers)) for i, layer in enumerate(layers)],
    }
    for name in (*_BY_TOKEN, "plain_steps"):
        arrays.add(name, torch.stack([_by_token(layer, name) for layer in layers]))
    meta["arrays"] = arrays.places
    files = resources.files("implicit_attention.inspection")
    html: str = file_html(
        _figures(layers, count), INLINE, title, template=(files / "page.html").read_text(encoding="utf-8"),
        template_variables={
            "meta": json.dumps(meta, allow_nan=False).replace("<", "\\u003c"),
            "data": b64encode(gzip.compress(arrays.content, 6, mtime=0)).decode(),
            "script": (files / "page.js").read_text(encoding="utf-8"),
            "layers": layers,
        },
    )  # fmt: skip
    return html


class _Arrays:
    """Arrays one behind the other, and where each begins."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.places: dict[str, tuple[str, int, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Append an array; what is no byte and no uint16 becomes float32."""
        kind = {torch.uint8: "Uint8Array", torch.uint16: "Uint16Array"}.get(values.dtype, "Float32Array")
        values = values if kind != "Float32Array" else values.to(torch.float32)
        self.content += bytes(-len(self.content) % 4)
        self.places[name] = (kind, len(self.content), values.numel())
        self.content += values.contiguous().numpy().tobytes()


def _layer(layer: LayerReport, index: int, arrays: _Arrays, longest: int) -> dict[str, Any]:
    """Put the arrays of a layer with the others, and return the rest."""
    stack = torch.cat([layer.maps, layer.settled_map[None]])  # [K + 1, H, N, M]
    top = stack.topk(min(_TOP, stack.shape[-1]))
    trace = layer.trace.amax(1)
    arrays.add(f"maps{index}", pooled(stack))
    arrays.add(f"where{index}", top.indices.to(torch.uint16))
    arrays.add(f"weight{index}", (top.values * 65535).round().to(torch.int32).to(torch.uint16))
    arrays.add(f"trace{index}", F.pad(trace, (0, 0, 0, longest - len(trace)), value=torch.nan))
    steps = layer.steps.double()
    bins = min(20, int(steps.max() - steps.min()) + 1)
    low, high = float(steps.min()) - 0.5, float(steps.max()) + 0.5
    return {
        "name": layer.name,
        "iterations": [*map(str, layer.iterations), SETTLED],
        "heads": stack.shape[1],
        "cells": list(cells_of(stack)),
        "top": top.indices.shape[-1],
        "taken": len(trace),
        "tolerance": layer.tolerance.tolist(),
        "edges": torch.linspace(low, high, bins + 1).tolist(),
        "counts": torch.histc(steps, bins, low, high).tolist(),
    }


def pooled(weights: Tensor) -> Tensor:
    """Return attention maps as bytes, `255 sqrt(weight)`, in at most 128 x 128 cells.

    Args:
        weights: `[..., N, M]`.

    Returns:
        `[..., R, C]`, uint8.
    """
    rows, columns = weights.shape[-2:]
    down, across = -(-rows // _CELLS), -(-columns // _CELLS)
    padded = F.pad(weights, (0, -columns % across, 0, -rows % down))
    high, wide = cells_of(weights)
    cells = padded.reshape(*weights.shape[:-2], high, down, wide, across).sum((-3, -1))
    share = torch.full((cells.shape[-2], 1), float(down))
    share[-1] = rows - (len(share) - 1) * down
    return (255 * (cells / share).clamp(0, 1).sqrt()).round().to(torch.uint8)


def cells_of(weights: Tensor) -> tuple[int, int]:
    """Return the number of cells of a map, down and across."""
    rows, columns = weights.shape[-2:]
    down, across = -(-rows // _CELLS), -(-columns // _CELLS)
    return -(-rows // down), -(-columns // across)


def _by_token(layer: LayerReport, name: str) -> Tensor:
    """A figure of each token, `[N]`; of several heads the worst, with NaN for what plain iteration does not reach."""
    values: Tensor = getattr(layer, name).float()
    if values.dim() == 1:
        return values
    return torch.where((values < 0).any(0), torch.nan, values.amax(0))


def _longest(layers: tuple[LayerReport, ...]) -> int:
    return max(len(layer.trace) for layer in layers)


def _visible(token: str) -> str:
    """A token with symbols for what would not be seen."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def _figures(layers: tuple[LayerReport, ...], count: int) -> "list[figure]":
    """The drawings, which page.js fills. Its names for their parts are given here."""
    seen, longest = layers[0].settled_map.shape[-1], _longest(layers)
    cells = cells_of(layers[0].settled_map)
    reach = [c * -(-n // _CELLS) for c, n in zip(cells, (count, seen), strict=True)]
    attention = _image("map", torch.zeros(cells, dtype=torch.uint8), (0, 255), reach, (count, seen),
                       "token that is seen", "token that sees", {0: "0", 63.75: "1/16", 127.5: "1/4", 255: "1"},
                       along="row")  # fmt: skip
    low = math.log10(min(float(layer.tolerance.min()) for layer in layers)) - 1
    ends = (low, max(low + 1, math.log10(max(float(layer.trace.nan_to_num(0).max()) for layer in layers) + 1e-16)))
    shape = (longest, count)
    trace = _image("trace", torch.zeros(shape), ends, shape, shape, "token", "step of plain iteration", {})
    shape = (len(layers), count)
    strip = _image("strip", torch.zeros(shape), (0, 1), shape, shape, "token", "layer", {})
    return [attention, trace, strip, _curve(), _histogram()]


def _image(
    name: str, values: Tensor, ends: tuple[float, float], reach: Any, shape: tuple[int, int], across: str, down: str,
    ticks: dict[float, str], *, along: str = "column",
) -> "figure":  # fmt: skip
    """An image whose rows go down; pointing at it picks a token."""
    from bokeh.events import MouseMove, Tap
    from bokeh.models import ColorBar, ColumnDataSource, CustomJS, FixedTicker, LinearColorMapper, Span
    from bokeh.palettes import Cividis256
    from bokeh.plotting import figure

    plot = figure(name=name, x_range=(0, shape[1]), y_range=(shape[0], 0), x_axis_label=across, y_axis_label=down,
                  **_SMALL | {"height": 420 if name == "map" else 240})  # fmt: skip
    plot.grid.visible = False
    source = ColumnDataSource({"image": [values.numpy()]}, name=f"{name}-source")
    colours = LinearColorMapper(
        Cividis256, low=ends[0], high=ends[1], nan_color="rgba(0,0,0,0)", name=f"{name}-colours"
    )
    plot.image("image", x=0, y=0, dw=reach[1], dh=reach[0], source=source, color_mapper=colours)
    bar = ColorBar(color_mapper=colours, width=10, background_fill_alpha=0)
    if ticks:
        bar.ticker, bar.major_label_overrides = FixedTicker(ticks=list(ticks)), ticks
    plot.add_layout(bar, "right")
    plot.add_layout(Span(dimension="width" if along == "row" else "height", location=0.5, line_color="#D55E00",
                         line_width=1.5, name=f"{name}-span"))  # fmt: skip
    for event in (MouseMove, Tap):
        where = "cb_obj.y" if along == "row" else "cb_obj.x"
        layer = "cb_obj.y" if name == "strip" and event is Tap else "null"
        plot.js_on_event(event, CustomJS(code=f"window.inspection?.point({where}, {layer})"))
    if shape[0] < 10:
        plot.yaxis.ticker = [i + 0.5 for i in range(shape[0])]
        plot.yaxis.major_label_overrides = {i + 0.5: str(i) for i in range(shape[0])}
    return plot


def _curve() -> "figure":
    from bokeh.models import ColumnDataSource, Span
    from bokeh.plotting import figure

    plot = figure(name="curve", y_axis_type="log", x_axis_label="step of plain iteration", y_axis_label="residual",
                  **_SMALL)  # fmt: skip
    source = ColumnDataSource({"x": [0, 1], "y": [1.0, 1.0]}, name="curve-source")
    plot.line("x", "y", source=source, line_color="#0072B2", line_width=2)
    plot.scatter("x", "y", source=source, color="#0072B2", size=5)
    plot.add_layout(Span(dimension="width", location=1e-5, line_dash="dashed", line_color="#D55E00", name="tolerance"))
    plot.grid.grid_line_alpha = 0.3
    return plot


def _histogram() -> "figure":
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

    plot = figure(name="histogram", x_axis_label="steps of the layer's solver", y_axis_label="tokens", **_SMALL)
    source = ColumnDataSource({"left": [0], "right": [1], "top": [0]}, name="histogram-source")
    plot.quad(
        left="left", right="right", bottom=0, top="top", source=source, fill_color="#0072B2", line_color="#56B4E9"
    )
    plot.y_range.start = 0
    plot.grid.grid_line_alpha = 0.3
    return plot
