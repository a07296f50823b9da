"""The parts of docs/causal.md that are about whole layers: what `layer`, `feedback` and `encoder` measured."""

from typing import Any

from benchmarks.readme import title
from benchmarks.report import PASSES
from studies.cells import markdown

Result = dict[str, Any]


def whole(result: Result) -> list[str]:
    """The layer beside an ordinary one, for each shape."""
    text = (
        "Times are ratios to an ordinary attention layer of the same shapes (keys and queries with an RMS norm, one "
        "call of SDPA), projections included. All have "
        f"{', '.join(f'`{name}`' for name, on in result['options'].items() if on is True)}. "
        f"Tolerance {result['rtol']:g}. "
        '`kernel="torch"` is what is left without a compiler. '
        f"Figures are medians of {_rounds(result)}, {result['clock']} time; single rounds lie "
        "between {:.2f} and {:.2f} times the median.".format(*_extremes(result))
    )
    return [text, _by_shape(result)]


def _rounds(result: Result) -> str:
    """In how many rounds each shape was measured."""
    counts = {shape["repeats"]: shape["length"] for shape in reversed(result["shapes"])}
    most, *fewer = sorted(counts, reverse=True)
    return f"{most} rounds" + "".join(f", {count} from {counts[count]} tokens on" for count in fewer)


def _extremes(result: Result) -> tuple[float, float]:
    """The smallest and the largest ratio of a single round, over the median ratio of its layer, shape and pass."""
    found = []
    for shape in result["shapes"]:
        ordinary, *others = shape["rows"].values()
        for row, name in ((row, name) for row in others for name in PASSES):
            pairs = zip(row[name]["seconds"], ordinary[name]["seconds"], strict=True)
            found += [a / b / row[name]["time_ratio"] for a, b in pairs]
    return min(found), max(found)


def feedback(result: Result) -> list[str]:
    """The layer whose values read outputs, beside a GRU."""
    text = (
        'With `values="feedback"` rows have to be computed one after the other, as in a recurrent network. Times are '
        "ratios to the ordinary layer, counted in processor time."
    )
    return [text, _by_shape(result)]


def encoder(result: Result) -> list[str]:
    """The layer without a mask, beside `nn.MultiheadAttention`."""
    text = (
        "The recommended layer without a mask (`for_encoder`, a contraction by construction) against "
        "`torch.nn.MultiheadAttention`, which has no positions, forward and backward, counted in processor time. "
        "*Sharp*: the weights that make scores are four times as large. The layer solves to the tolerance of 5 % that "
        "it has by default."
    )
    head = ["batch, tokens", "weights", "times", "without positions", "evaluations", "adjoint's", "bound of the gain",
            "its radius"]  # fmt: skip
    rows = [
        [f"{row['batch']}, {row['length']}", row["weights"], f"{row['time_ratio']:.2f}",
         f"{row['time_ratio_without_positions']:.2f}", str(row["evaluations"]),
         str(row["adjoint_steps"]), f"{row['bound']:.1f}", f"{row['radius']:.3f}"]
        for row in result["rows"]
    ]  # fmt: skip
    return [text, markdown([head, *rows])]


def _by_shape(result: Result) -> str:
    """Each shape's ratios, forward and forward + backward; empty for a layer that was not measured there."""
    names = list(dict.fromkeys(name for shape in result["shapes"] for name in shape["rows"]))[1:]
    rows = []
    for shape in result["shapes"]:
        sizes = [shape["batch"], shape["length"], shape["embed_dim"], shape["num_heads"]]
        found = [shape["rows"].get(name) for name in names]
        ratios = ["" if row is None else " / ".join(f"{row[p]['time_ratio']:.2f}" for p in PASSES) for row in found]
        rows.append([", ".join(map(str, sizes)), *ratios])
    titles = [title(name) for name in names]
    return markdown([["batch, tokens, width, heads; forward / both", *titles], *rows])
