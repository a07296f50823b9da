"""The tables of the page of results: one row an arm, every figure from its records."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from studies import verdicts
from studies.run import Record
from studies.table import Table

# Scores that leave out what is easy to guess: prefixes as short as in training, hops that lead nowhere.
STRICT = ("last_quarter_accuracy", "found_accuracy")
Cost = Callable[[Sequence[Record], Record], float]  # what a step of a run costs, given all runs of its row


def cells(table: Table, rows: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Return the table of scores.

    Args:
        table: The table.
        rows: Its records.

    Returns:
        The head; then for each row mean and standard deviation over seeds of the score of each kind (of one kind, all
        scores; a strict one of the last kind), seeds solved and what that took, learning rate, parameters, operations
        and milliseconds.
    """
    kinds, score = kinds_of(rows), table.task.score
    shown, sign = (score[1:], -1) if score.startswith("-") else (score, 1)
    others = other_scores(rows, kinds[0], (score, shown)) if len(kinds) == 1 else []
    strict = strict_score(rows)
    head = ["arm", *(shown if len(kinds) == 1 else f"{shown}, {kind}" for kind in kinds), *others]
    head += [] if strict is None else [f"{strict}, {kinds[-1]}"]
    endless = table.training.solved is None
    bounds = {cost: least(rows, cost) for cost in (seconds, operations) if endless}
    lines = []
    for name, runs in rows.items():
        line = [table.rows[name].title if name in table.rows else name]
        lengthened = name in table.rows and table.rows[name].lengthened > 1
        line += [spread(value(run, kind, score, sign) for run in runs) for kind in kinds]
        line += [spread(value(run, kinds[0], other, 1) for run in runs) for other in others]
        line += [] if strict is None else [spread(value(run, kinds[-1], strict, 1) for run in runs)]
        line += [] if endless else solved(runs)
        line += [
            spread(at_equal(runs, most, cost, sign)) if math.isfinite(most) and not lengthened else ""
            for cost, most in bounds.items()
        ]
        if not table.task.is_causal:
            line.append(settled(runs))
        lines.append(line + costs(runs))
    head += (
        ["at equal seconds", "at equal FLOPs"] if endless
        else ["seeds solved", "steps to solve", "TFLOPs to solve", "seconds to solve", "of all rates"]
    )  # fmt: skip
    if not table.task.is_causal:
        head.append("unsettled, at worst")
    head += ["learning rate", "parameters", "GFLOPs a step", "ms a step"]
    return [[name.replace("_", " ") for name in head], *lines]


def kinds_of(rows: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the kinds of held-out sequences, in their order."""
    return list(dict.fromkeys(kind for runs in rows.values() for run in runs for kind in run["scores"]))


def other_scores(rows: Mapping[str, Sequence[Record]], kind: str, known: tuple[str, ...]) -> list[str]:
    """Return the names of the other scores of a kind."""
    names = (name for runs in rows.values() for run in runs for name in run["scores"].get(kind, {}))
    return [name for name in dict.fromkeys(names) if name not in known]


def strict_score(rows: Mapping[str, Sequence[Record]]) -> str | None:
    """Return the name of the score that leaves out what is easy to guess, None if the records have none."""
    names = {name for runs in rows.values() for run in runs for scores in run["scores"].values() for name in scores}
    return next((name for name in STRICT if name in names), None)


def value(run: Record, kind: str, score: str, sign: int) -> float | None:
    """Return a final score, None if the run has none."""
    found = run["scores"].get(kind, {}).get(score)
    return None if found is None else sign * found


def solved(runs: Sequence[Record]) -> list[str]:
    """Return how many seeds solved the task, medians of their steps, operations and seconds, and solved runs in all.

    The last is over all learning rates that were tried on whole runs.
    """
    count = sum(run["solved_at"] is not None for run in runs)
    tried = [run for outcomes in ((runs[0].get("choice") or {}).get("tried") or {}).values() for run in outcomes]
    every = f"{sum(run['solved_at'] is not None for run in tried)} of {len(tried)}" if tried else ""
    if not count:
        return [f"0 of {len(runs)}", f"not within {runs[0]['settings']['training']['steps']}", "", "", every]
    operations = verdicts.median(runs, verdicts.operations_to_solve)
    return [
        f"{count} of {len(runs)}",
        f"{verdicts.median(runs, verdicts.steps_to_solve):.0f}",
        f"{operations / 1e12:.3g}",
        _number(verdicts.median(runs, verdicts.steps_to_solve) * verdicts.pace(runs), ".3g"),
        every,
    ]


def settled(runs: Sequence[Record]) -> str:
    """Return the largest share of systems above tolerance in any training step; empty if nothing is solved."""
    if not any(entry.get("solver") for run in runs for entry in run["curve"]):
        return ""
    return f"{100 * max(run.get('unsettled', 0.0) for run in runs):.1f} %"


def costs(runs: Sequence[Record]) -> list[str]:
    """Return learning rate, parameters, operations and milliseconds of a step."""
    flops = [run["flops"] for run in runs if run["flops"] is not None]
    rates = sorted({run["settings"]["rate"] for run in runs})
    pace = 1e3 * verdicts.pace(runs)
    return [
        ", ".join(f"{rate:g}{edge(rate, runs[0]['settings']['training']['rates'])}" for rate in rates),
        f"{runs[0]['parameters']:,}",
        f"{statistics.mean(flops) / 1e9:.3g}" if flops else "",
        _number(pace, ".0f"),
    ]


def edge(rate: float, tried: Sequence[float]) -> str:
    """Return whether a chosen learning rate is the smallest or the largest of those tried; "" if it is neither."""
    if len(tried) < 2 or min(tried) < rate < max(tried):
        return ""
    return " (smallest)" if rate <= min(tried) else " (largest)"


def seconds(runs: Sequence[Record], run: Record) -> float:
    """Return the seconds of a step of a run: those of its row."""
    return verdicts.pace(runs)


def operations(runs: Sequence[Record], run: Record) -> float:
    """Return the operations of a step of a run; infinity if they are not known."""
    return float("inf") if run["flops"] is None else float(run["flops"])


def least(rows: Mapping[str, Sequence[Record]], cost: Cost) -> float:
    """Return what the row whose training costs least spends (a median over its runs): all rows are compared there."""
    spent: Iterable[float] = (
        statistics.median(cost(runs, run) * run["curve"][-1]["step"] for run in runs if run["curve"])
        for runs in rows.values()
    )
    return min(spent)


def at_equal(runs: Sequence[Record], most: float, cost: Cost, sign: int) -> list[float | None]:
    """Return each run's score at its last evaluation that had spent no more than `most`; None if there is none."""
    found = []
    for run in runs:
        each = cost(runs, run)
        within = [e["score"] for e in run["curve"] if each * e["step"] <= most * 1.02 and e["score"] is not None]
        found.append(sign * within[-1] if within else None)
    return found


def solver_table(table: Table, rows: Mapping[str, Sequence[Record]]) -> str:
    """Return the table of solver statistics, empty if no row has any."""
    lines = []
    for name, runs in rows.items():
        ends = [run["curve"][-1].get("solver", {}) for run in runs if run["curve"]]
        last = [figures for end in ends for figures in end.values() if figures]  # none where outputs overflowed
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


def _number(number: float, form: str) -> str:
    return format(number, form) if math.isfinite(number) else ""


def _or_inf(number: float | None) -> float:
    return float("inf") if number is None else number
