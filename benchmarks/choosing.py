"""The tables of docs/choosing.md: what layers learn whose values read outputs, made from docs/data/eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.readme import between
from studies.cells import kinds_of, markdown, spread, value
from studies.suite import tables
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
BLOCKS = {"bytes-1": "1 block", "bytes-2": "2 blocks"}


def by_kind(found: Mapping[str, Rows], name: str, arms: Sequence[str]) -> str:
    """The score of each kind of held-out sequences, for some rows of a table."""
    table, rows = tables("cpu")[name], found[name]
    kinds, score = kinds_of(rows), table.task.score
    lines = [
        [
            table.rows[arm].title,
            *(spread((value(run, kind, score, 1) for run in rows[arm]), digits=2) for kind in kinds),
        ]
        for arm in arms
        if arm in rows
    ]
    return markdown([["layer", *(kind.replace("length=", "at ") for kind in kinds)], *lines])


def of_bytes(found: Mapping[str, Rows]) -> str:
    """Bits per byte, and how many times the seconds of ordinary attention the training takes."""
    shown = tables("cpu")
    arms = [arm for arm in TEXT if all(arm in found[name] for name in BLOCKS)]
    lines = [[shown["bytes-1"].rows[arm].title] for arm in arms]
    for name in BLOCKS:
        rows = found[name]
        for line, arm in zip(lines, arms, strict=True):
            times = training_seconds(rows[arm]) / training_seconds(rows["ordinary"])
            line += [spread(-run["score"] for run in rows[arm]), f"{times:.2f}"]
    head = [column for words in BLOCKS.values() for column in (words, "times the seconds")]
    return markdown([["layer", *head], *lines])


def filled(text: str, found: Mapping[str, Rows]) -> str:
    """The page with its tables made anew."""
    text = between(text, "parity", by_kind(found, "parity", STATE))
    text = between(text, "positions", by_kind(found, "parity", BEYOND))
    text = between(text, "products", by_kind(found, "words-s3", STATE))
    return between(text, "bytes", of_bytes(found))
