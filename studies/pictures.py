"""Pictures of tables: scores and solver statistics by step, gradients by spectral radius."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from studies.run import Record
from studies.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Mapping[str, Sequence[Record]]
# Okabe and Ito's colours, as in `inspection.plots`, by arm: an arm looks the same in every picture.
STYLES = {
    "ordinary": ("#000000", "-"),
    "ordinary-2": ("#000000", "--"),
    "ordinary-longer": ("#000000", "-."),
    "looped": ("#E69F00", "-"),
    "strict": ("#56B4E9", "-"),
    "implicit": ("#0072B2", "-"),
    "recurrent": ("#009E73", "-"),
    "gru": ("#D55E00", "-"),
    "gru-attention": ("#D55E00", ":"),
    "shifted": ("#CC79A7", "-"),
    "keys-2": ("#E69F00", ":"),
    "keys-4": ("#E69F00", "--"),
    "keys-8": ("#000000", ":"),
    "convolved": ("#E69F00", "-."),
    "convolved-2": ("#000000", "-."),
    "convolved-9": ("#E69F00", ":"),
    "strict-convolved": ("#56B4E9", "--"),
    "delta": ("#D55E00", "--"),
    "delta-slow": ("#D55E00", "-."),
    "feedback": ("#009E73", "--"),
    "feedback-plain": ("#009E73", ":"),
    "feedback-alone": ("#CC79A7", "--"),
    "bounded": ("#56B4E9", "-"),
    "strict-one": ("#56B4E9", ":"),
    "strict-half": ("#56B4E9", "-."),
    "feedback-one": ("#009E73", "-."),
    "feedback-half": ("#CC79A7", "-."),
    "feedback-none": ("#CC79A7", ":"),
    "feedback-alibi": ("#0072B2", "--"),
    "feedback-rope": ("#0072B2", ":"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def table(shown: Table, rows: Rows) -> "Figure":
    """Draw a table's runs.

    Args:
        shown: The table.
        rows: Its records.

    Returns:
        The figure: score against steps; steps of the solver and gain, where they are not the same throughout; gradients
        against the spectral radius, if they were measured.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    panels = [_scores]
    panels += [draw for draw, figure in ((_steps, "steps"), (_gains, "largest_gain")) if _varies(rows, figure)]
    if any("gradients" in entry for runs in rows.values() for run in runs for entry in run["curve"]):
        panels.append(_gradients)
    width = max(4.6 * len(panels), 9.2)
    longest = max(len(_title(shown, name)) for name in rows)
    columns = min(4, max(1, int(width / (0.6 + 0.068 * longest))))  # in inches: of the line, and of a letter
    size = (width, 4.2 + 0.2 * math.ceil(len(rows) / columns) + 0.2)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    styles = _styles(rows)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        draw(axes, shown, rows, styles)
        axes.locator_params(axis="x", nbins=6, integer=draw is not _gradients)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(shown.title)
    return figure


def _title(shown: Table, row: str) -> str:
    return shown.rows[row].title.replace("`", "") if row in shown.rows else row


def _styles(rows: Rows) -> dict[str, dict[str, Any]]:
    known = any(name in STYLES for name in rows)  # rows of arms; others are values of an option
    taken = [STYLES[name] for name in rows if known and name in STYLES]
    free = ((colour, line) for line in cycle(("-", "--", ":")) for colour in COLOURS)
    others = (style for style in free if style not in taken)
    found = {name: STYLES[name] if known and name in STYLES else next(others) for name in rows}
    return {name: {"color": colour, "linestyle": line} for name, (colour, line) in found.items()}


def _scores(axes: "Axes", shown: Table, rows: Rows, styles: Mapping[str, dict[str, Any]]) -> None:
    score = shown.task.score
    sign = -1 if score.startswith("-") else 1
    late = []
    for name, runs in rows.items():
        curves = [{e["step"]: sign * e["score"] for e in run["curve"] if e["score"] is not None} for run in runs]
        steps, middle, low, high = _band(curves)
        if steps:
            axes.plot(steps, middle, label=_title(shown, name), linewidth=2, **styles[name])
            axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.12, linewidth=0)
            late += [value for curve in curves for step, value in curve.items() if 4 * step >= max(curve)]
    label = score.lstrip("-").replace("_", " ")
    worst = len({kind for runs in rows.values() for run in runs for kind in run["scores"]}) > 1
    axes.set(xlabel="training step", ylabel=f"held-out {label}{', worst kind' if worst else ''}")
    if sign > 0:
        axes.set_ylim(0, 1.03)
    elif late:
        margin = 0.05 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - margin, max(late) + margin)


def _band(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Mean and extremes over seeds at every step. A run that stopped early keeps its last value."""
    steps = sorted({step for curve in curves for step in curve})
    values = []
    for step in steps:
        at = [[v for s, v in curve.items() if s <= step] for curve in curves]
        values.append([seen[-1] for seen in at if seen])
    return steps, [statistics.mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _series(runs: Sequence[Record], figure: str) -> list[dict[int, float]]:
    """A figure of the solver by step, over the kinds the mean, for each run."""
    found = []
    for run in runs:
        curve = {
            entry["step"]: statistics.mean(kind[figure] for kind in entry["solver"].values())
            for entry in run["curve"]
            if "solver" in entry and all(kind.get(figure) is not None for kind in entry["solver"].values())
        }
        found += [curve] if curve else []
    return found


def _varies(rows: Rows, figure: str) -> bool:
    return len({value for runs in rows.values() for curve in _series(runs, figure) for value in curve.values()}) > 1


def _steps(axes: "Axes", shown: Table, rows: Rows, styles: Mapping[str, dict[str, Any]]) -> None:
    _solver(axes, rows, styles, "steps")
    axes.set(xlabel="training step", ylabel="solver's steps, mean over rows")
    axes.set_ylim(bottom=0)


def _gains(axes: "Axes", shown: Table, rows: Rows, styles: Mapping[str, dict[str, Any]]) -> None:
    _solver(axes, rows, styles, "largest_gain")
    axes.axhline(1, color="0.45", linewidth=1, linestyle="--")
    axes.set(xlabel="training step", ylabel="largest gain (spectral radius)")
    axes.set_ylim(bottom=0)


def _solver(axes: "Axes", rows: Rows, styles: Mapping[str, dict[str, Any]], figure: str) -> None:
    for name, runs in rows.items():
        steps, middle, low, high = _band(_series(runs, figure))
        if steps:
            axes.plot(steps, middle, linewidth=2, **styles[name])
            axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.12, linewidth=0)


def _gradients(axes: "Axes", shown: Table, rows: Rows, styles: Mapping[str, dict[str, Any]]) -> None:
    points = [e["gradients"] for runs in rows.values() for run in runs for e in run["curve"] if "gradients" in e]
    for kind, colour, marker in zip(("implicit", "phantom", "one step"), COLOURS, "osD", strict=False):
        places = [(p["radius"], p[kind]) for p in points if p["radius"] is not None and p[kind] is not None]
        if places:
            axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=4, alpha=0.7, label=kind)
    axes.axvline(1, color="0.45", linewidth=1, linestyle="--")
    axes.set(xlabel="spectral radius", ylabel="cosine to the exact gradient")
    axes.legend(frameon=False, fontsize=9)
