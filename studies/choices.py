"""The defaults that the records recommend: the candidates of each option, compared."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studies.run import Record

Records = Mapping[str, Mapping[str, Sequence[Record]]]


@dataclass(frozen=True)
class Choice:
    """An option, and the rows of tables that are compared to choose its value.

    Attributes:
        option: Its name in `ImplicitQueryAttention`.
        tables: Where its candidates are compared.
        rows: The row of each candidate value. Where several are never behind, the first is recommended.
    """

    option: str
    tables: tuple[str, ...]
    rows: Mapping[str, str]


CHOICES = (
    Choice(
        "self_query",
        ("recall-64", "recall-128", "recall-256", "gaps", "gaps-keys", "khop-48", "bytes-1", "bytes-2"),
        {'"output"': "implicit", '"input"': "strict"},
    ),
    Choice("qk_norm", ("qk-norm",), {"True": "implicit", "False": "implicit-no-norm"}),
    Choice(
        "positions",
        ("positions", "positions-bytes"),
        # At the rate of all other weights, as with an optimiser that gets a model's parameters.
        {'"rope"': "implicit-rope", '"relative"': "implicit-relative-one-rate", '"alibi"': "implicit-alibi",
         "None": "implicit-none"},
    ),
    Choice(
        "adjoint",
        ("adjoint",),
        {'"implicit"': "implicit-implicit", "Phantom()": "implicit-phantom", "one step": "implicit-one-step"},
    ),
    Choice(
        "tolerance",
        ("tolerance",),
        {f"{tolerance:g}": f"implicit-{tolerance:.0e}" for tolerance in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)},
    ),
)  # fmt: skip


def merit(runs: Sequence[Record]) -> tuple[float, float]:
    """Return the figures that rows are compared by: the share of seeds solved, then the mean score.

    Args:
        runs: The records of a row; a run without a score counts as the worst.
    """
    solved = statistics.mean(run["solved_at"] is not None for run in runs)
    scores = [-float("inf") if run["score"] is None else float(run["score"]) for run in runs]
    return solved, statistics.mean(scores)


def deviation(runs: Sequence[Record]) -> float:
    """Return the standard deviation of the scores; runs without a score are left out.

    Args:
        runs: The records of a row.
    """
    return _spread([run["score"] for run in runs if run["score"] is not None])


def _spread(figures: Sequence[float]) -> float:
    return statistics.stdev(figures) if len(figures) > 1 else 0.0


def ahead(first: Sequence[Record], second: Sequence[Record]) -> bool:
    """Return whether a row is ahead of another: more seeds solved; all solved in fewer steps; else a better mean score.

    Steps and scores must differ by more than the sum of both deviations. Scores say nothing where all seeds solved the
    task: training stops at once there.

    Args:
        first: The records of a row.
        second: The records of the other row.
    """
    (solved, score), (other_solved, other_score) = merit(first), merit(second)
    if solved != other_solved:
        return solved > other_solved
    if solved == 1:
        steps, other_steps = ([run["solved_at"] for run in runs] for runs in (first, second))
        saved = statistics.mean(other_steps) - statistics.mean(steps)
        return bool(saved > _spread(steps) + _spread(other_steps))
    return score - other_score > deviation(first) + deviation(second)


def compared(choice: Choice, found: Records) -> dict[str, tuple[int, int]]:
    """Return for each candidate how many others it is ahead of, and how many it is behind.

    Args:
        choice: The option.
        found: Records by table, row and seed. A table without a candidate does not count for it.
    """
    tally = dict.fromkeys(choice.rows, (0, 0))
    for table in choice.tables:
        rows = {value: runs for value, row in choice.rows.items() if (runs := found.get(table, {}).get(row))}
        for value, runs in rows.items():
            others = [other for name, other in rows.items() if name != value]
            won, lost = tally[value]
            tally[value] = won + sum(ahead(runs, o) for o in others), lost + sum(ahead(o, runs) for o in others)
    return tally


def recommended(choice: Choice, found: Records) -> str | None:
    """Return the first value that is never behind, else the one most often ahead net of behind; None without records.

    Args:
        choice: The option.
        found: As in `compared`.
    """
    if not any(row in found.get(table, {}) for table in choice.tables for row in choice.rows.values()):
        return None
    tally = compared(choice, found)
    never_behind = [value for value, (_, lost) in tally.items() if lost == 0]
    return never_behind[0] if never_behind else max(tally, key=lambda value: tally[value][0] - tally[value][1])
