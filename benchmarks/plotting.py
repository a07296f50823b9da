"""The pictures of docs/: what a causal solve costs against the length, and two language models learning."""

from typing import TYPE_CHECKING, Any

from benchmarks.peers import CONTESTANTS, SDPA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"time_ratio": "time", "memory_ratio": "added peak memory"}
# Okabe and Ito's colours, as in implicit_attention.inspection.plots; the library's own curves are the bold ones.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "linewidth": 2.6, "zorder": 3},
    "ours-input": {"color": "#56B4E9", "marker": "v", "linewidth": 2.0, "zorder": 3},
    "unrolled": {"color": "#E69F00", "marker": "D"},
    "seed": {"color": "#000000", "marker": "X"},
    "torchdeq-picard": {"color": "#D55E00", "marker": "s"},
    "torchdeq-anderson": {"color": "#CC79A7", "marker": "^"},
}


def figure(result: dict[str, Any]) -> "Figure":
    """Draw forward and backward together, one curve for each contestant."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.2, 4.6), dpi=150, layout="constrained")
    panels: list[Axes] = list(drawn.subplots(1, len(PANELS)))
    for axes, (quantity, title) in zip(panels, PANELS.items(), strict=True):
        for name in CONTESTANTS:
            curve(axes, result, name, quantity)
        axes.axhline(1, color="0.45", linewidth=1, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set(title=f"{title}, forward + backward", xlabel="tokens N", xscale="log", yscale="log")
        lengths = [shape["length"] for shape in result["shapes"]]
        axes.set_xticks(lengths, [f"{n}\nbatch {s['batch']}" for n, s in zip(lengths, result["shapes"], strict=True)])
        axes.minorticks_off()
        label_ratios(axes)
    panels[0].set_ylabel("relative to one causal attention pass")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def curve(axes: "Axes", result: dict[str, Any], name: str, quantity: str) -> None:
    points = [
        (shape["length"], shape["rows"][name]["forward_backward"][quantity])
        for shape in result["shapes"]
        if name in shape["rows"]
    ]
    if name == SDPA or not points:
        return
    axes.plot(*zip(*points, strict=True), label=CONTESTANTS[name].label, markersize=5, **STYLES[name])


def label_ratios(axes: "Axes") -> None:
    """Ticks at round ratios, written as numbers and not as powers of ten."""
    low, high = axes.get_ylim()
    fine = (1.5, 3, 7) if high < 40 * low else ()
    ticks = [t for t in sorted((0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, *fine)) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])


def learning(result: dict[str, Any]) -> "Figure":
    """Draw the held-out curve of every run of the language model benchmark."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = drawn.subplots()
    styles = {"ordinary": {"color": "#E69F00", "linestyle": "--"}, "implicit": {"color": "#0072B2", "linewidth": 2.2}}
    named: set[str] = set()
    for run in result["runs"]:
        arm, steps = run["arm"], [int(step) for step in run["curve"]]
        label = None if arm in named else f"{arm} attention"
        named.add(arm)
        axes.plot(steps, list(run["curve"].values()), marker="o", markersize=3.5, label=label, **styles[arm])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set(xlabel="step", ylabel="bits per byte, held out (sample)", title="One block, one line for each seed")
    axes.legend(frameon=False)
    return drawn
