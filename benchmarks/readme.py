"""The two tables of the README, made from docs/data: what the layer costs, and what it learns."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.layer import LAYERS
from benchmarks.report import origin
from studies import verdicts
from studies.cells import markdown, solved, spread, strict_score, value
from studies.report import worst_score
from studies.suite import tables
from studies.table import Table

Result = dict[str, Any]
Records = Mapping[str, Mapping[str, Sequence[Result]]]

TASKS = {
    "recall-64": "look up 4 pairs in 64 tokens",
    "gaps": "look up 6 pairs, 0 to 6 fillers between key and value",
    "khop-48": "follow 1 to 8 hops in 48 tokens that lead to a token",
    "parity": "parity of up to 160 bits, over the last quarter; learned at 40",
    "words-s3": "products of up to 128 permutations (S3), likewise; learned at 32; guessing gives 0.167",
    "bytes-2": "Python source, 2 blocks (bits per byte, less is better)",
    "digits-1": "which digit, no mask",
    "masked-bytes": "hidden bytes, no mask, 2 blocks (bits per byte, less is better)",
}
# One arm for all tasks with a causal mask, and one without: the best of several would be chosen by its figures.
IMPLICIT, FEEDBACK = ("strict", "bounded"), ("feedback",)
LENGTHS = (100, 512, 4096)  # of the shapes, to keep the README short


def cost_table(result: Result | None, other: Result | None = None) -> str:
    """What training a layer costs, as times an ordinary attention layer of the same shapes, on up to two processors."""
    if result is None or not result["correct"]:
        return "Not measured yet."
    head = ["tokens", "batch, width, heads", *(title(name) for name in LAYERS)]
    rows = [
        [str(shape["length"]), f"{shape['batch']}, {shape['embed_dim']}, {shape['num_heads']}"]
        + [_ratio(shape["rows"].get(name)) for name in LAYERS]
        for shape in result["shapes"]
        if shape["length"] in LENGTHS
    ]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return (
        markdown([head, *rows])
        + f"\n\n{result['processor']}, {threads}, PyTorch {result['versions']['torch']}, {result['dtype']}, "
        + f"tolerance {result['rtol']:g}. `python -m benchmarks layer`.\n{origin(result)}"
        + ("" if other is None else f" {_elsewhere(other)}")
    )


def _elsewhere(other: Result) -> str:
    """What the default layer costs on another processor."""
    found = {
        shape["length"]: _ratio(shape["rows"]["default"]) for shape in other["shapes"] if shape["length"] in LENGTHS
    }
    ratios = ", ".join(f"{ratio} at {length}" for length, ratio in found.items())
    return f'On {other["processor"]} "output" takes {ratios} tokens.'


def _ratio(row: Result | None) -> str:
    """Forward and backward, and the forward pass alone in brackets."""
    return "" if row is None else f"{row['forward_backward']['time_ratio']:.2f} ({row['forward']['time_ratio']:.2f})"


def title(name: str) -> str:
    """The name of a layer of a benchmark in a table: code where it is one."""
    name = 'self_query="output"' if name == "default" else name
    return f"`{name}`" if "=" in name else name


def learning_table(found: Records) -> str:
    """What an implicit layer learns, next to an ordinary one and to the strongest baseline."""
    head = ["task", "ordinary attention", "strongest baseline", "implicit", '`values="feedback"`']
    shown, lines = tables("cpu"), []
    for name, words in TASKS.items():
        if (rows := found.get(name)) is None:
            continue
        table = shown[name]
        ours = [next((rows[arm] for arm in arms if arm in rows), None) for arms in (IMPLICIT, FEEDBACK)]
        baseline = verdicts.strongest_of_all(table, rows, [runs for runs in ours if runs])
        assert baseline is not None
        lines.append([
            words, result(table, rows["ordinary"]), f"{baseline.title}: {result(table, baseline.runs)}",
            *("" if runs is None else result(table, runs) for runs in ours),
        ])  # fmt: skip
    return markdown([head, *lines])


def result(table: Table, runs: Sequence[Result]) -> str:
    """Mean and deviation over seeds of a score, of the hardest kind; where a task can be solved, how many seeds did.

    The score is the one that decides, or one that leaves out what is easy to guess, if there is one.
    """
    strict = strict_score({"": runs})
    sign = -1 if table.task.score.startswith("-") else 1
    score = worst_score(runs, sign) if strict is None else spread(_worst(run, strict) for run in runs)
    return score if table.training.solved is None else f"{score} ({solved(runs)[0]})"


def _worst(run: Result, score: str) -> float | None:
    """A score of a run's hardest kind, None if a kind has none."""
    found = [value(run, kind, score, 1) for kind in run["scores"]]
    return None if None in found else min(found, default=None)  # type: ignore[type-var]


def filled(text: str, result: Result | None, other: Result | None, found: Records) -> str:
    """The README with its tables made anew."""
    return between(between(text, "costs", cost_table(result, other)), "learns", learning_table(found))


def between(text: str, name: str, figures: str) -> str:
    """A page with what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->` made anew.

    Raises:
        ValueError: If the page lacks one of the two.
    """
    start, end = f"<!-- {name}: made by `python -m benchmarks.page` -->", f"<!-- end of {name} -->"
    before, opening, rest = text.partition(start)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise ValueError(f"the page must have the lines {start!r} and {end!r}")
    return f"{before}{start}\n\n{figures}\n\n{end}{after}"
