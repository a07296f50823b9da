"""Plots of residuals, attention and training curves. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.solution import Solution
from implicit_attention.errors import Came, bad_type, bad_value, check_positive, missing_extra
from implicit_attention.inspection.checking import by_step, check_named, check_share, labels_of, numbers, residuals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One figure per step; or several, `[steps, ...]`, of which the largest is drawn, as in a solution's `abs_trace`.
Trace = Sequence[float] | Tensor | Solution

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
        traces: Curves by name; or panels by title, each with its curves by name. A curve is a `Solution`, whose
            `abs_trace` is drawn; or a tensor such as its `rel_trace`, `[steps, ...]`; or a figure for each step. It has
            at least two steps. Of several systems the largest figure is drawn. Zeros, which have no logarithm, are left
            out.
        tolerance: The tolerance, drawn as a line.
        quantity: Label of the vertical axis.

    Returns:
        The figure, 1350 pixels wide for two panels when saved as it is.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If a curve or the tolerance is of the wrong type, or a curve has no name.
        ValueError: If there is nothing to draw, as in the trace of a direct solver, which takes no steps.
    """
    check_named("traces", traces, "curve", '{"Picard": solution}')
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    panels = _panels(traces)
    figure = _figure(4.5 * max(len(panels), 1.6), 4.2)
    for axes, (title, curves) in zip(_row(figure, len(panels)), panels.items(), strict=True):
        for (name, heights), colour, marker in zip(curves.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
            _decay(axes, name, heights, color=colour, marker=marker)
        if tolerance is not None:
            axes.axhline(tolerance, color="0.45", linewidth=1, linestyle="--")
            axes.annotate("tolerance", (1, tolerance), (-3, 3), ("axes fraction", "data"), "offset points",
                          ha="right", color="0.35", fontsize=9)  # fmt: skip
        longest = max(len(heights) for heights in curves.values())
        axes.set(title=title, xlabel="step", ylabel=quantity, yscale="log", xlim=(-0.04 * longest, 1.04 * longest))
        axes.locator_params(axis="x", integer=True)
        axes.legend(frameon=False)
    return figure


def _panels(traces: Mapping[str, Trace | Mapping[str, Trace]]) -> dict[str, dict[str, Tensor]]:
    """The figures of each curve, by panel; curves outside panels are in the last, without a title."""
    panels: dict[str, dict[str, Tensor]] = {}
    loose = {}
    for title, given in traces.items():
        argument = f"traces[{title!r}]"
        if isinstance(given, Mapping):
            check_named(argument, given, "curve", '{"Picard": solution}')
            panels[title] = {name: residuals(f"{argument}[{name!r}]", trace) for name, trace in given.items()}
        else:
            loose[title] = residuals(argument, given)
    return panels | {"": loose} if loose else panels


def _decay(axes: "Axes", name: str, heights: Tensor, *, color: str, marker: str) -> None:
    """Draw one curve, with a note where it ends because the rest is zero."""
    steps = torch.arange(len(heights))[(heights > 0) & heights.isfinite()]
    every = max(1, len(steps) // 12)
    style: dict[str, Any] = {"color": color, "marker": marker, "markevery": every, "markersize": 5, "linewidth": 1.8}
    empty = "nothing above 0" if heights.any() else "always 0"
    axes.plot(steps.numpy(), heights[steps].numpy(), label=name if len(steps) else f"{name}: {empty}", **style)
    last = int(steps[-1]) if len(steps) else len(heights)
    if last + 1 < len(heights) and not heights[last + 1 :].any():
        axes.annotate("then 0", (last, float(heights[last])), (7, 0), textcoords="offset points", va="center",
                      color=color, fontsize=9)  # fmt: skip


def recall(curves: Mapping[str, Mapping[int, float]], *, guess: float | None = None) -> "Figure":
    """Draw accuracy against training steps.

    Args:
        curves: For each model, its accuracy in [0, 1] by training step.
        guess: The accuracy of guessing, drawn as a line.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If a curve or its numbers are of the wrong type.
        ValueError: If there is no curve, a curve is empty, or a number is not in [0, 1].
    """
    check_named("curves", curves, "curve", '{"implicit": {100: 0.5, 200: 0.9}}')
    if guess is not None:
        check_share("guess", guess)
    drawn = {name: by_step(f"curves[{name!r}]", curve, "an accuracy") for name, curve in curves.items()}
    for name, curve in drawn.items():
        if not curve:
            raise bad_value("curves", "an accuracy for at least one step of each model", Came(f"none for {name!r}"))
        for step, accuracy in curve.items():
            check_share(f"curves[{name!r}][{step}]", accuracy)
    figure = _figure(8, 4.5)
    (axes,) = _row(figure, 1)
    for (name, curve), colour, marker in zip(drawn.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
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
        curves: By name, the loss by training step. NaN and Inf are left out.
        quantity: Label of the vertical axis.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If a curve or its numbers are of the wrong type.
        ValueError: If there is nothing to draw.
    """
    check_named("curves", curves, "curve", '{"training": {100: 2.5, 200: 2.1}}')
    drawn = {name: by_step(f"curves[{name!r}]", curve, "a loss") for name, curve in curves.items()}
    if not any(drawn.values()):
        raise bad_value("curves", "a loss for at least one step", Came("none"))
    figure = _figure(8, 4.5)
    (axes,) = _row(figure, 1)
    for (name, curve), colour in zip(drawn.items(), cycle(_COLOURS), strict=False):
        sparse = len(curve) <= 30
        style: dict[str, Any] = {"marker": "o" if sparse else None, "markersize": 5, "linewidth": 2 if sparse else 1}
        axes.plot(list(curve), list(curve.values()), color=colour, label=name, **style)
    # The first losses are so large that later differences could not be seen beside them.
    late = [height for curve in drawn.values() for step, height in curve.items() if 10 * step >= max(curve)]
    late = [height for height in late if isfinite(height)]
    axes.set(xlabel="training step", ylabel=quantity)
    if any(late):
        axes.set_ylim(0.98 * min(late), 1.05 * max(late))
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
        TypeError: If a map is no tensor or has no name, or a label is no string.
        ValueError: If there is no map, one has another number of dimensions, or the labels are not as many as tokens.
    """
    check_named("maps", maps, "attention matrix", '{"attention": weights}')
    remedy = "A layer returns those of all samples with need_weights=True: draw weights[0]."
    stacks = {t: numbers(f"maps[{t!r}]", w, "[N, M] or [H, N, M]", (2, 3), remedy) for t, w in maps.items()}
    labels = None if tokens is None else labels_of(stacks, tokens)
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
        if labels is not None:
            axes.set_xticks(range(len(labels)), labels, rotation=90, family="monospace")
            axes.set_yticks(range(len(labels)), labels, family="monospace")
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
        TypeError: If `values` is no tensor, or `ax` no axes.
        ValueError: If `values` has another number of dimensions, or no entries.
    """
    drawn = numbers("values", values, "[R, C]", (2,))
    axes = _axes(ax, 6, 4.5)
    axes.grid(visible=False)
    image = axes.imshow(drawn.numpy(), cmap="cividis", aspect="auto", interpolation="nearest")
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
        TypeError: If `values` is no tensor, or `ax` no axes.
        ValueError: If `values` has another number of dimensions, or no entries.
    """
    drawn = numbers("values", values, "[N]", (1,))
    axes = _axes(ax, 8, 3.5)
    axes.plot(drawn.numpy(), color=_COLOURS[0], marker="o", markersize=3, linewidth=1)
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


def _axes(ax: object, width: float, height: float) -> "Axes":
    """The axes that were given, or those of a new figure."""
    if ax is None:
        return _row(_figure(width, height), 1)[0]
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise bad_type("ax", "matplotlib's Axes or None", ax, "Of several, give one: axes[0].")
    return ax


def _row(figure: "Figure", count: int) -> "list[Axes]":
    """Panels side by side, in one style."""
    panels: Any = figure.subplots(1, count, squeeze=False)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return list(panels[0])
