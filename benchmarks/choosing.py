"""The tables of docs/choosing.md: what layers learn, from docs/data/eval, and how near `Contraction` comes."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.readme import between
from studies.cells import kinds_of, markdown, spread, strict_score, value
from studies.suite import tables
from studies.table import Row
from studies.verdicts import training_seconds

Rows = Mapping[str, Sequence[dict[str, Any]]]

STATE = (
    "ordinary", "ordinary-2", "convolved", "recurrent", "strict", "feedback", "feedback-plain", "feedback-alone",
    "delta", "gru", "gru-attention",
)  # fmt: skip
BEYOND = ("feedback", "feedback-rope", "feedback-alibi", "feedback-none")
TEXT = (
    "ordinary", "ordinary-longer", "ordinary-2", "convolved", "strict", "strict-convolved", "feedback",
    "feedback-alone", "delta", "gru", "gru-attention",
)  # fmt: skip
FREE = ("ordinary", "ordinary-longer", "ordinary-2", "looped", "implicit", "bounded")
BLOCKS = {"bytes-1": "1 block", "bytes-2": "2 blocks"}
UNMASKED = {
    "digits-1": "which digit, 1 block",
    "digits-2": "2 blocks",
    "pixels": "half of the pixels: squared error",
    "masked-bytes": "hidden bytes: bits per byte",
}


def by_kind(found: Mapping[str, Rows], name: str, arms: Sequence[str]) -> str:
    """The score of each kind of held-out sequences, and a stricter one of the last, for some rows of a table."""
    table, rows = tables("cpu")[name], found[name]
    kinds, strict = kinds_of(rows), strict_score(rows)
    assert strict is not None
    shown = [*((kind, table.task.score) for kind in kinds), (kinds[-1], strict)]
    lines = [
        [
            table.rows[arm].title,
            *(spread((value(run, kind, score, 1) for run in rows[arm]), digits=2) for kind, score in shown),
        ]
        for arm in arms
        if arm in rows
    ]
    head = [*kinds, f"last quarter {kinds[-1]}"]
    return markdown([["layer", *(words.replace("length=", "at ") for words in head)], *lines])


def with_seconds(found: Mapping[str, Rows], names: Mapping[str, str], arms: Sequence[str]) -> str:
    """The scores of rows in some tables, and how many times the seconds of ordinary attention the training takes."""
    shown = tables("cpu")
    arms = [arm for arm in arms if all(arm in found[name] for name in names)]
    lines = [[_title([shown[name].rows[arm] for name in names])] for arm in arms]
    for name in names:
        rows = found[name]
        for line, arm in zip(lines, arms, strict=True):
            times = training_seconds(rows[arm]) / training_seconds(rows["ordinary"])
            line += [spread(abs(run["score"]) for run in rows[arm]), f"{times:.2f}"]
    head = [column for words in names.values() for column in (words, "times the seconds")]
    return markdown([["layer", *head], *lines])


def _title(rows: Sequence[Row]) -> str:
    """What an arm is called in several tables, which may train it for longer than the others by different factors."""
    factors = sorted({row.lengthened for row in rows})
    if len(factors) == 1:
        return rows[0].title
    return f"ordinary attention, {factors[0]:g} to {factors[-1]:g} times the steps"


def nearness(result: dict[str, Any] | None) -> str:
    """The errors of layers with `max_gain`, and the spectral radii, by setting."""
    if result is None or not result["correct"]:
        return "Not measured yet." if result is None else result["verdict"]
    head = ["layers and inputs", "samples", "outputs: median", "largest", "gradients: largest", "radius: median"]
    lines = []
    for setting in result["settings"].values():
        outputs, radius = setting["outputs"], setting["radius"]
        gradients = f"{setting['gradients']['largest']:.1e}" if isinstance(setting["gradients"], dict) else ""
        errors = [f"{outputs[of]:.1e}" for of in ("median", "largest")]
        radii = [f"{radius[of]:.3f}" for of in ("median", "largest")]
        lines.append([setting["title"], f"{outputs['count']:,}", *errors, gradients, *radii])
    return markdown([[*head, "largest"], *lines])


def filled(text: str, found: Mapping[str, Rows], contraction: dict[str, Any] | None) -> str:
    """The page with its tables made anew."""
    text = between(text, "parity", by_kind(found, "parity", STATE))
    text = between(text, "positions", by_kind(found, "parity", BEYOND))
    text = between(text, "products", by_kind(found, "words-s3", STATE))
    text = between(text, "bytes", with_seconds(found, BLOCKS, TEXT))
    text = between(text, "unmasked", with_seconds(found, UNMASKED, FREE))
    return between(text, "contraction", nearness(contraction))
