"""Plots of residuals, attention and training curves. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicit_attention.errors import Came, bad_value, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trace = Sequence[float] | Tensor  # one figure per step; or several, `[steps, ...]`, of which the largest is drawn

# Okabe and Ito's colours, which suit all kinds of colour vision. Markers help in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_DPI = 150


def convergence(
    traces: Mapping[str, Trace | Mapping[str, Trace]],
    *,
    tolerance: float | None = None,
    quantity: str = "residual",
) -> "Figure":
    """Draw residuals against steps on a logarithmic scale.

    Args:
        traces: Curves by name; or panels by title, each with its curves by name. A curve has at least two figures, one
            for each step, or is `Solution.abs_trace`, of which the largest system is drawn. Zeros, which have no
            logarithm, are left out.
        tolerance: The tolerance, drawn as a line.
        quantity: Label of the vertical axis.

    Returns:
        The figure, 1350 pixels wide for two panels when saved as it is.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is nothing to draw, as in the trace of a direct solver, which takes no steps.
    """
    panels = {title: curves for title, curves in traces.items() if isinstance(curves, Mapping)}
    loose = {name: trace for name, trace in traces.items() if not isinstance(trace, Mapping)}
    if loose:
        panels[""] = loose
    if not panels:
        raise bad_value("traces", "at least one curve", "none")
    figure = _figure(4.5 * max(len(panels), 1.6), 4.2)
    for axes, (title, curves) in zip(_row(figure, len(panels)), panels.items(), strict=True):
        for (name, trace), colour, marker in zip(curves.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
            _decay(axes, name, _heights(name, trace), color=colour, marker=marker)
        if tolerance is not None:
            axes.axhline(tolerance, color="0.45", linewidth=1, linestyle="--")
            axes.annotate("tolerance", (1, tolerance), (-3, 3), ("axes fraction", "data"), "offset points",
                          ha="right", color="0.35", fontsize=9)  # fmt: skip
        longest = max(len(trace) for trace in curves.values())
        axes.set(title=title, xlabel="step", ylabel=quantity, yscale="log", xlim=(-0.04 * longest, 1.04 * longest))
        axes.locator_params(axis="x", integer=True)
        axes.legend(frameon=False)
    return figure


def _heights(name: str, trace: Trace) -> Tensor:
    """The figures of a curve, `[steps]`."""
    heights = torch.as_tensor(trace).detach().double().cpu()
    heights = heights.flatten(1).amax(1) if heights.dim() > 1 else heights
    if heights.numel() < 2:
        raise bad_value(
            f"traces[{name!r}]", "a figure for each of several steps", Came(f"{heights.numel()}"),
            "A direct solver such as ForwardSubstitution takes no steps that could be drawn: solve with "
            "solver=Picard() or Anderson().",
        )  # fmt: skip
    return heights


def _decay(axes: "Axes", name: str, heights: Tensor, *, color: str, marker: str) -> None:
    """Draw one curve, with a note where it ends because the rest is zero."""
    steps = torch.arange(len(heights))[heights > 0]
    every = max(1, len(steps) // 12)
    style: dict[str, Any] = {"color": color, "marker": marker, "markevery": every, "markersize": 5, "linewidth": 1.8}
    axes.plot(steps.numpy(), heights[steps].numpy(), label=name if len(steps) else f"{name}: always 0", **style)
    if 0 < len(steps) < len(heights):
        end = (int(steps[-1]), float(heights[steps[-1]]))
        axes.annotate("then 0", end, (7, 0), textcoords="offset points", va="center", color=color, fontsize=9)


def recall(curves: Mapping[str, Mapping[int, float]], *, guess: float | None = None) -> "Figure":
    """Draw accuracy against training steps.

    Args:
        curves: For each model, its accuracy in [0, 1] by training step.
        guess: The accuracy of guessing, drawn as a line.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If a curve is empty.
    """
    figure = _figure(8, 4.5)
    (axes,) = _row(figure, 1)
    for (name, curve), colour, marker in zip(curves.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
        if not curve:
            raise bad_value("curves", "an accuracy for at least one step of each model", f"none for {name!r}")
        steps, heights = list(curve), [100 * a for a in curve.values()]
        axes.plot(steps, heights, color=colour, marker=marker, markersize=4, linewidth=2, label=name)
        axes.annotate(f"{heights[-1]:.1f} %", (steps[-1], heights[-1]), (6, 0), textcoords="offset points",
                      va="center", color=colour, fontweight="bold")  # fmt: skip
    if guess is not None:
        axes.axhline(100 * guess, color="0.45", linewidth=1, linestyle="--", label="guessing")
    axes.set(xlabel="training step", ylabel="held-out accuracy (%)", ylim=(0, 104))
    axes.margins(x=0.09)
    axes.legend(frameon=False, loc="center right")
    return figure


def learning(curves: Mapping[str, Mapping[int, float]], *, quantity: str = "bits per byte") -> "Figure":
    """Draw a loss against training steps.

    Args:
        curves: By name, the loss by training step.
        quantity: Label of the vertical axis.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is nothing to draw.
    """
    if not any(curves.values()):
        raise bad_value("curves", "a loss for at least one step", "none")
    figure = _figure(8, 4.5)
    (axes,) = _row(figure, 1)
    for (name, curve), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        sparse = len(curve) <= 30
        style: dict[str, Any] = {"marker": "o" if sparse else None, "markersize": 5, "linewidth": 2 if sparse else 1}
        axes.plot(list(curve), list(curve.values()), color=colour, label=name, **style)
    # The first losses are so large that later differences could not be seen beside them.
    late = [height for curve in curves.values() for step, height in curve.items() if 10 * step >= max(curve)]
    axes.set(xlabel="training step", ylabel=quantity, ylim=(0.98 * min(late), 1.05 * max(late)))
    axes.legend(frameon=False)
    return figure


def attention(maps: Mapping[str, Tensor], *, tokens: Sequence[str] | None = None) -> "Figure":
    """Draw attention matrices side by side, on one scale of colour.

    Args:
        maps: By title, `[N, M]` or `[H, N, M]`; heads get rows of their own.
        tokens: Labels of the N = M tokens.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no map, or one has another number of dimensions.
    """
    stacks = {title: weights.detach().float().cpu() for title, weights in maps.items()}
    if not stacks:
        raise bad_value("maps", "at least one attention matrix", "none")
    for title, weights in stacks.items():
        if weights.dim() not in (2, 3):
            raise bad_value(f"maps[{title!r}]", "of shape [N, M] or [H, N, M]", weights)
    panels = [
        (f"{title}, head {head + 1}" if len(heads) > 1 else title, weights)
        for title, heads in ((t, w if w.dim() == 3 else w[None]) for t, w in stacks.items())
        for head, weights in enumerate(heads)
    ]
    columns = 2 if len(panels) == 4 else min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = _figure(min(4.6 * columns, 9.2), min(4.2, 8.4 / columns) * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    brightest = max(float(weights.max()) for _, weights in panels)
    shared: list[Axes] = []
    for axes, (title, weights) in zip(grid, panels, strict=False):
        image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=brightest, interpolation="nearest")
        axes.set_title(title)
        axes.tick_params(length=0, labelsize=7)
        if tokens is not None:
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, family="monospace")
            axes.set_yticks(range(len(tokens)), tokens, family="monospace")
        shared.append(axes)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("token that is seen", fontsize=10)
    figure.supylabel("token that sees", fontsize=10)
    figure.colorbar(image, ax=shared, label="attention weight", shrink=0.6)
    return figure


def heat(values: Tensor, across: str, down: str, title: str, *, ax: "Axes | None" = None) -> "Figure":
    """Draw a matrix as colours.

    Args:
        values: `[R, C]`.
        across: What the columns are.
        down: What the rows are.
        title: Of the drawing.
        ax: Where to draw; axes of a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
    """
    axes = _row(_figure(6, 4.5), 1)[0] if ax is None else ax
    axes.grid(visible=False)
    image = axes.imshow(values.detach().float().cpu().numpy(), cmap="cividis", aspect="auto", interpolation="nearest")
    axes.set(xlabel=across, ylabel=down, title=title)
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes)
    return figure  # type: ignore[no-any-return]


def by_token(values: Tensor, quantity: str, title: str, *, ax: "Axes | None" = None) -> "Figure":
    """Draw a figure of each token.

    Args:
        values: `[N]`.
        quantity: What it is.
        title: Of the drawing.
        ax: Where to draw; axes of a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
    """
    axes = _row(_figure(8, 3.5), 1)[0] if ax is None else ax
    axes.plot(values.detach().double().cpu().numpy(), color=_COLOURS[0], marker="o", markersize=3, linewidth=1)
    axes.set(xlabel="token", ylabel=quantity, title=title)
    figure: Any = axes.figure
    return figure  # type: ignore[no-any-return]


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, `width` x `height` inches at 150 dots, apart from matplotlib's global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("a plot", "matplotlib", "plot") from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _row(figure: "Figure", count: int) -> "list[Axes]":
    """Panels side by side, in one style."""
    panels: Any = figure.subplots(1, count, squeeze=False)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return list(panels[0])
