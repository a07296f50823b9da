"""Draw docs/images/map.png, the picture of the README: `python docs/draw_map.py`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

OUT = Path(__file__).parent / "images" / "map.png"
INK, GREY, LOOP, DONE = "#1f2933", "#8795a1", "#c2410c", "#bfd7ea"
BLOCKS, ROWS = 3, 4  # of the matrix of scores: diagonal blocks, and rows in each


def draw() -> Figure:
    """Return the figure: the map on the left, how a causal one is solved on the right."""
    figure = Figure(figsize=(10.8, 4.1), dpi=160)
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    draw_map(left)
    draw_blocks(right)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.02, wspace=0.04)
    return figure


def draw_map(axes: Axes) -> None:
    """The map: keys and values come from the input, queries from the output."""
    axes.set(xlim=(0, 10.4), ylim=(0, 6.0))
    axes.set_title("The equation: queries are made from the output", fontsize=12, color=INK)
    axes.axis("off")
    box(axes, (0.2, 2.6), 1.3, "input\n$x$")
    box(axes, (2.5, 4.4), 1.9, "keys\n$K = W_K x$")
    box(axes, (2.5, 2.6), 1.9, "values\n$V = \\Omega_V x$")
    box(axes, (2.5, 0.8), 1.9, "queries\n$Q = \\Omega_Q y$", LOOP)
    box(axes, (5.0, 3.7), 2.7, "weights over queries\n$P = \\mathrm{softmax}(K Q^T / \\sqrt{d})$")
    box(axes, (8.5, 2.6), 1.6, "output\n$y = P\\,V$", LOOP)
    arrow(axes, (1.5, 3.3), (2.5, 4.9))
    arrow(axes, (1.5, 3.15), (2.5, 3.15))
    arrow(axes, (4.4, 4.95), (5.0, 4.5))
    arrow(axes, (4.4, 1.6), (5.9, 3.7), LOOP)
    arrow(axes, (7.7, 4.1), (8.5, 3.5))
    arrow(axes, (4.4, 2.95), (8.5, 2.95))
    arrow(axes, (9.3, 2.6), (4.4, 1.05), LOOP, bend=-0.35)
    axes.text(7.55, 0.42, "solved until $y = F(y)$", color=LOOP, fontsize=11, ha="center")


def draw_blocks(axes: Axes) -> None:
    """The scores under a causal mask: which of them are computed once, and which are iterated."""
    count = BLOCKS * ROWS
    axes.set(xlim=(-1.2, count + 0.3), ylim=(count + 2.6, -1.5), aspect="equal")
    axes.set_title("Causal: solved block by block", fontsize=12, color=INK)
    axes.axis("off")
    for row in range(count):
        for column in range(row + 1):
            own = row // ROWS == column // ROWS
            axes.add_patch(Rectangle((column, row), 0.92, 0.92, facecolor=LOOP if own else DONE, edgecolor="none"))
    axes.text(count / 2, -0.5, "queries of tokens $j$, from the output", ha="center", fontsize=9, color=INK)
    axes.text(-0.5, count / 2, "rows: keys of tokens $i$", rotation=90, va="center", ha="center", fontsize=9, color=INK)
    for y, color, text in (
        (count + 0.6, LOOP, "diagonal block: iterated until it settles"),
        (count + 1.7, DONE, "below it: ordinary attention, computed once"),
    ):
        axes.add_patch(Rectangle((0, y), 0.8, 0.8, facecolor=color, edgecolor="none"))
        axes.text(1.2, y + 0.42, text, va="center", fontsize=9, color=INK)


def box(axes: Axes, corner: tuple[float, float], width: float, text: str, color: str = INK) -> None:
    """A box with a text; `corner` is its lower left one."""
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(
        FancyBboxPatch(corner, width, 1.1, boxstyle=style, facecolor="white", edgecolor=color, linewidth=1.6)
    )
    axes.text(corner[0] + width / 2, corner[1] + 0.55, text, ha="center", va="center", fontsize=10, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GREY, bend: float = 0.0
) -> None:
    """An arrow between two points; `bend` curves it."""
    look = {"color": color, "linewidth": 1.6, "shrinkA": 2, "shrinkB": 2, "connectionstyle": f"arc3,rad={bend}"}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, **look))


if __name__ == "__main__":
    draw().savefig(OUT)
