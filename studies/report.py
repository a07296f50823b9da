"""The page of results. Every figure on it comes from the records."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from studies import choices, sentences
from studies.arms import ARMS
from studies.run import Record
from studies.suite import Table

Records = Mapping[str, Mapping[str, Sequence[Record]]]
IMAGE = "eval-{}.png"


def page(found: Records, tables: Mapping[str, Table]) -> str:
    """Return the page.

    Args:
        found: Records by table, row and seed, as `records.load` gives them.
        tables: The tables by name. Those without records are left out.

    Returns:
        Markdown.
    """
    shown = [(table, found[name]) for name, table in tables.items() if name in found]
    parts = ["# Results", sentences.INTRODUCTION, *sentences.machines(found)]
    if lacking := missing(found, tables):
        parts.append(sentences.missing(lacking))
    if len(summary := overview(shown)) > 1:
        parts += ["## In short", sentences.OVERVIEW, markdown(summary)]
    if chosen := recommendation(found):
        parts += ["## Defaults", sentences.DEFAULTS, *chosen]
    for table, rows in shown:
        ordered = in_order(table, rows)
        parts += [f"## {table.title}", *sentences.settings(table, ordered)]
        parts.append(f"![{table.title}: score against steps](images/{IMAGE.format(table.name)})")
        parts.append(markdown(cells(table, ordered)))
        if solver := solver_table(table, ordered):
            parts += [
                sentences.SOLVER,
                solver,
            ]
        if gradients := gradient_table(table, ordered):
            parts += [sentences.GRADIENTS, gradients]
    return "\n\n".join(parts) + "\n"


def missing(found: Records, tables: Mapping[str, Table]) -> list[str]:
    """Return the tables that lack runs, with the rows that lack them unless all do.

    Args:
        found: As in `page`.
        tables: As in `page`.
    """
    lacking = []
    for name, table in tables.items():
        rows = found.get(name, {})
        open_rows = [row for row in table.rows if len(rows.get(row, [])) < table.seeds]
        if open_rows:
            lacking.append(name if len(open_rows) == len(table.rows) else f"{name} ({', '.join(open_rows)})")
    return lacking


def overview(shown: Sequence[tuple[Table, Mapping[str, Sequence[Record]]]]) -> list[list[str]]:
    """Return a line for each table that compares arms: the scores of some arms, and the best arm.

    Args:
        shown: Tables and their records.
    """
    arms = ("ordinary", "ordinary-2", "implicit")
    lines = [["task", "score", *(ARMS[arm].title for arm in arms), "the best arm"]]
    for table, rows in shown:
        if not any(arm in rows for arm in arms) or table.group == "studies":
            continue
        score = table.task.score
        sign = -1 if score.startswith("-") else 1
        worst = ", worst kind" if len(kinds_of(rows)) > 1 else ""
        best = max(rows, key=lambda name: choices.merit(rows[name]))
        lines.append([
            table.title, score.lstrip("-").replace("_", " ") + worst,
            *(worst_score(rows.get(arm, []), sign) for arm in arms),
            f"{table.rows[best].title if best in table.rows else best}: {worst_score(rows[best], sign)}",
        ])  # fmt: skip
    return lines


def worst_score(runs: Sequence[Record], sign: int) -> str:
    """Return mean and deviation over seeds of the deciding score, that of the hardest kind; empty without runs."""
    return spread(None if run["score"] is None else sign * run["score"] for run in runs) if runs else ""


def recommendation(found: Records) -> list[str]:
    """Return a paragraph for each option that the records compare."""
    return [
        sentences.choice(choice, value, choices.compared(choice, found), [t for t in choice.tables if t in found])
        for choice in choices.CHOICES
        if (value := choices.recommended(choice, found)) is not None
    ]


def in_order(table: Table, rows: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    """Return the rows that have records, in the table's order; unknown rows come last."""
    known = {name: rows[name] for name in table.rows if rows.get(name)}
    return known | {name: runs for name, runs in rows.items() if name not in known and runs}


def cells(table: Table, rows: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Return the table of scores.

    Args:
        table: The table.
        rows: Its records.

    Returns:
        The head; then for each row mean and standard deviation over seeds of the score of each kind (of one kind, all
        scores), seeds solved, steps, learning rate, parameters, operations and milliseconds.
    """
    kinds, score = kinds_of(rows), table.task.score
    shown, sign = (score[1:], -1) if score.startswith("-") else (score, 1)
    others = other_scores(rows, kinds[0], (score, shown)) if len(kinds) == 1 else []
    head = ["arm", *(shown if len(kinds) == 1 else f"{shown}, {kind}" for kind in kinds), *others]
    lines = []
    for name, runs in rows.items():
        line = [table.rows[name].title if name in table.rows else name]
        line += [spread(value(run, kind, score, sign) for run in runs) for kind in kinds]
        line += [spread(value(run, kinds[0], other, 1) for run in runs) for other in others]
        if table.training.solved is not None:
            line += solved(runs)
        if table.group == "bytes":
            line.append(spread(at_equal_seconds(runs, equal_seconds(rows), sign)))
        lines.append(line + costs(runs))
    if table.training.solved is not None:
        head += ["seeds solved", "steps to solve"]
    if table.group == "bytes":
        head.append("at equal seconds")
    head += ["learning rate", "parameters", "GFLOPs a step", "ms a step"]
    return [[name.replace("_", " ") for name in head], *lines]


def kinds_of(rows: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the kinds of held-out sequences, in their order."""
    return list(dict.fromkeys(kind for runs in rows.values() for run in runs for kind in run["scores"]))


def other_scores(rows: Mapping[str, Sequence[Record]], kind: str, known: tuple[str, ...]) -> list[str]:
    """Return the names of the other scores of a kind."""
    names = (name for runs in rows.values() for run in runs for name in run["scores"].get(kind, {}))
    return [name for name in dict.fromkeys(names) if name not in known]


def value(run: Record, kind: str, score: str, sign: int) -> float | None:
    """Return a final score, None if the run has none."""
    found = run["scores"].get(kind, {}).get(score)
    return None if found is None else sign * found


def solved(runs: Sequence[Record]) -> list[str]:
    """Return how many seeds solved the task, and the median of their steps."""
    steps = [run["solved_at"] for run in runs if run["solved_at"] is not None]
    return [f"{len(steps)} of {len(runs)}", f"{statistics.median(steps):.0f}" if steps else ""]


def costs(runs: Sequence[Record]) -> list[str]:
    """Return learning rate, parameters, operations and milliseconds of a step."""
    flops = [run["flops"] for run in runs if run["flops"] is not None]
    per_step = [1e3 * run["seconds"] / run["last_step"] for run in runs if run["last_step"]]
    rates = sorted({run["settings"]["rate"] for run in runs})
    return [
        ", ".join(f"{rate:g}" for rate in rates),
        f"{runs[0]['parameters']:,}",
        f"{statistics.mean(flops) / 1e9:.3g}" if flops else "",
        f"{statistics.median(per_step):.0f}" if per_step else "",
    ]


def equal_seconds(rows: Mapping[str, Sequence[Record]]) -> float:
    """Return the median time of the fastest row's runs, at which all rows are compared."""
    medians: list[float] = [statistics.median(run["seconds"] for run in runs) for runs in rows.values()]
    return min(medians)


def at_equal_seconds(runs: Sequence[Record], seconds: float, sign: int) -> list[float | None]:
    """Return each run's score at its last evaluation within a time; None if there is none."""
    found = []
    for run in runs:
        within = [e["score"] for e in run["curve"] if e["seconds"] <= seconds * 1.02 and e["score"] is not None]
        found.append(sign * within[-1] if within else None)
    return found


def solver_table(table: Table, rows: Mapping[str, Sequence[Record]]) -> str:
    """Return the table of solver statistics, empty if no row has any."""
    lines = []
    for name, runs in rows.items():
        last = [entry for run in runs if run["curve"] for entry in run["curve"][-1].get("solver", {}).values()]
        if not last:
            continue
        starts = [run["path_independence"] for run in runs if run["path_independence"]]
        lines.append([
            table.rows[name].title if name in table.rows else name,
            f"{statistics.mean(e['steps'] for e in last):.1f}",
            f"{max(e['most_steps'] for e in last):.0f}",
            f"{max(_or_inf(e['residual']) for e in last):.0e}",
            percent([e["unconverged"] for e in last]),
            f"{max(e['largest_gain'] for e in last):.2f}" if "largest_gain" in last[0] else "",
            percent([s["arrived"] for s in starts]),
            percent([s["same"] for s in starts if "same" in s]),
        ])  # fmt: skip
    head = ["arm", "steps", "most steps", "largest residual", "above tolerance", "largest gain",
            "second start arrived", "of these the same"]  # fmt: skip
    return markdown([head, *lines]) if lines else ""


def gradient_table(table: Table, rows: Mapping[str, Sequence[Record]]) -> str:
    """Return the table of cosines between gradients and the exact one, empty if none were measured."""
    bounds = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, float("inf"))
    lines = []
    for name, runs in rows.items():
        points = [e["gradients"] for run in runs for e in run["curve"] if "gradients" in e]
        for low, high in itertools.pairwise(bounds):
            within = [p for p in points if p["radius"] is not None and low <= p["radius"] < high]
            if within:
                title = table.rows[name].title if name in table.rows else name
                cosines = [spread([p[g] for p in within], digits=4) for g in ("implicit", "phantom", "one step")]
                lines.append([title, f"{low:g} to {high:g}", str(len(within)), *cosines])
    head = ["arm", "spectral radius", "measured", "implicit", "phantom", "one step"]
    return markdown([head, *lines]) if lines else ""


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Return mean and standard deviation, and how many runs have no figure."""
    listed = list(values)
    numbers = [v for v in listed if v is not None]
    if not numbers:
        return "none"
    text = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{digits}f}"
    missing = len(listed) - len(numbers)
    return text if not missing else f"{text} ({missing} without)"


def percent(shares: Sequence[float]) -> str:
    """Return the mean of shares in percent, empty if there are none."""
    return f"{100 * statistics.mean(shares):.2f} %" if shares else ""


def markdown(lines: list[list[str]]) -> str:
    """Return a table in Markdown; the first line is its head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def _or_inf(number: float | None) -> float:
    return float("inf") if number is None else number


def write(directory: Path, found: Records, tables: Mapping[str, Table], *, name: str = "results.md") -> None:
    """Write the page and its pictures.

    Args:
        directory: Where the page goes; pictures go to `images/` in it.
        found: As in `page`.
        tables: As in `page`.
        name: Of the page.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from studies import pictures

    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    for table in tables.values():
        if table.name in found:
            figure = pictures.table(table, in_order(table, found[table.name]))
            figure.savefig(images / IMAGE.format(table.name))
    (directory / name).write_text(page(found, tables), encoding="utf-8")
