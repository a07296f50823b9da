"""What the page says first: the strongest baseline of each table, and how the implicit arms compare with it."""

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from studies import choices
from studies.arms import ARMS
from studies.run import Record
from studies.table import Table

Runs = Sequence[Record]
FEEDBACK = "feedback"  # how the names of arms begin whose values read outputs
BOUNDED = "bounded"  # likewise, of those with `max_gain`
SAME_TIME = 1.1  # times that differ by less than this factor count as the same


@dataclass(frozen=True)
class Contender:
    """The best row of one kind.

    Attributes:
        name: Of the row.
        title: Its name on the page.
        runs: Its records.
    """

    name: str
    title: str
    runs: Runs


@dataclass(frozen=True)
class Verdict:
    """How an implicit arm compares with the strongest baseline.

    Attributes:
        words: The comparison.
        helps: Whether it is a reason to use the arm.
    """

    words: str
    helps: bool


def strongest(table: Table, rows: Mapping[str, Runs], kind: str) -> Contender | None:
    """Return the best row of a kind: most seeds solved; then fewest steps, if all did; then the best score.

    Rows that train for more steps than the table's are left out.

    Args:
        table: The table.
        rows: Its records.
        kind: "baseline", "implicit" or "feedback". Without a causal mask, only arms with `max_gain` are "implicit".
    """
    return _best(table, _at_equal_steps(table, rows, kind))


def rival(table: Table, rows: Mapping[str, Runs], ours: Contender) -> Contender | None:
    """Return the baseline that an implicit arm is judged by at equal steps: the best of those that are ahead of it.

    Args:
        table: The table.
        rows: Its records.
        ours: The implicit arm.

    Returns:
        That baseline; the best of all if none is ahead, None if there is none.
    """
    return _judge(table, _at_equal_steps(table, rows, "baseline"), ours)


def rival_in_time(table: Table, rows: Mapping[str, Runs], ours: Contender) -> Contender | None:
    """Return the same among baselines whose whole training takes as long as that of an implicit arm, or less.

    Args:
        table: The table.
        rows: Its records.
        ours: The implicit arm.

    Returns:
        That baseline; None if there is none, or the arm was not timed.
    """
    most = SAME_TIME * training_seconds(ours.runs)
    if not math.isfinite(most):
        return None
    baselines = _of_kind(table, rows, "baseline")
    return _judge(table, {name: runs for name, runs in baselines.items() if training_seconds(runs) <= most}, ours)


def _judge(table: Table, baselines: Mapping[str, Runs], ours: Contender) -> Contender | None:
    ahead = {name: runs for name, runs in baselines.items() if choices.ahead(runs, ours.runs)}
    return _best(table, ahead or baselines)


def strongest_of_all(table: Table, rows: Mapping[str, Runs], ours: Sequence[Runs]) -> Contender | None:
    """Return the best baseline at equal steps or, if that is better, within the seconds of the slowest implicit arm.

    Args:
        table: The table.
        rows: Its records.
        ours: The records of the implicit arms.
    """
    most = SAME_TIME * max(map(training_seconds, ours), default=0.0)
    baselines = _of_kind(table, rows, "baseline")
    fair = {
        name: runs for name, runs in baselines.items()
        if table.rows[name].lengthened == 1 or training_seconds(runs) <= most < math.inf
    }  # fmt: skip
    return _best(table, fair)


def _at_equal_steps(table: Table, rows: Mapping[str, Runs], kind: str) -> dict[str, Runs]:
    return {name: runs for name, runs in _of_kind(table, rows, kind).items() if table.rows[name].lengthened == 1}


def _of_kind(table: Table, rows: Mapping[str, Runs], kind: str) -> dict[str, Runs]:
    return {name: runs for name, runs in rows.items() if runs and name in table.rows and _kind(table, name) == kind}


def _best(table: Table, rows: Mapping[str, Runs]) -> Contender | None:
    if not rows:
        return None
    best = max(rows, key=lambda name: merit(rows[name]))
    return Contender(best, table.rows[best].title, rows[best])


def _kind(table: Table, row: str) -> str:
    arm = table.rows[row].arm
    if arm.startswith(FEEDBACK):
        return FEEDBACK
    if not ARMS[arm].ours:
        return "baseline"
    recommended = table.task.is_causal or arm.startswith(BOUNDED)
    return "implicit" if recommended else "free"


def merit(runs: Runs) -> tuple[float, float, float]:
    """Return the figures that contenders are compared by, larger for better ones."""
    solved, score = choices.merit(runs)
    return solved, -median(runs, steps_to_solve) if solved == 1 else 0.0, score


def pace(runs: Runs) -> float:
    """Return the seconds of a training step, taken in turns with all other rows; infinity if they were not.

    Args:
        runs: The records of a row.
    """
    seconds = runs[0]["step_seconds"] if runs else None
    return float("inf") if seconds is None else float(seconds)


def training_seconds(runs: Runs) -> float:
    """Return the seconds of all steps of a row's training; infinity if it was not timed.

    Args:
        runs: The records of a row.
    """
    return pace(runs) * float(runs[0]["settings"]["training"]["steps"])


def steps_to_solve(run: Record) -> float | None:
    """Return the first of the two evaluations that solved the task, None if nothing did."""
    return None if run["solved_at"] is None else float(run["solved_at"])


def operations_to_solve(run: Record) -> float | None:
    """Return the operations of training until the task was solved, None if it was not."""
    return None if run["solved_at"] is None or run["flops"] is None else float(run["flops"] * run["solved_at"])


def median(runs: Runs, figure: Callable[[Record], float | None]) -> float:
    """Return the median of a figure over the runs that have it; infinity if none has."""
    found = [number for run in runs if (number := figure(run)) is not None]
    return statistics.median(found) if found else float("inf")


def compare(table: Table, ours: Contender, baseline: Contender) -> Verdict:
    """Return how an implicit arm compares with the strongest baseline.

    Args:
        table: The table.
        ours: The best implicit arm.
        baseline: The best of the others.
    """
    if table.training.solved is None:
        return by_score(ours.runs, baseline.runs)
    (mine, _), (theirs, _) = choices.merit(ours.runs), choices.merit(baseline.runs)
    if not mine and not theirs:
        verdict = by_score(ours.runs, baseline.runs)
        return Verdict(f"neither solves it within {table.training.steps} steps; {verdict.words}", verdict.helps)
    word = _word(ours.runs, baseline.runs)
    if mine != theirs:
        words = f"{word}; solves {_solved(ours.runs)} seeds, the baseline {_solved(baseline.runs)}"
        return Verdict(words, helps=mine > theirs)
    steps = median(ours.runs, steps_to_solve) / median(baseline.runs, steps_to_solve)
    seconds = steps * pace(ours.runs) / pace(baseline.runs)
    timed = f", {seconds:.2g} times the seconds" if math.isfinite(seconds) else ""
    wins, pairs = _wins(ours.runs, baseline.runs, _soonness)
    sooner = f"sooner in {wins} of {pairs} seeds"
    return Verdict(
        f"{word}; both solve {_solved(ours.runs)} seeds; {steps:.2g} times the steps{timed}, {sooner}",
        helps=word == "ahead",
    )


def by_score(ours: Runs, baseline: Runs) -> Verdict:
    """Return how an arm compares with a baseline by scores alone.

    Args:
        ours: The arm's records.
        baseline: Those of the baseline.
    """
    wins, pairs = _wins(ours, baseline, operator.itemgetter("score"))
    word = _word(ours, baseline)
    return Verdict(f"{word}, better in {wins} of {pairs} seeds", helps=word == "ahead")


def _word(ours: Runs, baseline: Runs) -> str:
    if choices.ahead(ours, baseline):
        return "ahead"
    return "behind" if choices.ahead(baseline, ours) else "not told apart"


def _wins(ours: Runs, baseline: Runs, figure: Callable[[Record], float | None]) -> tuple[int, int]:
    """In how many seeds an arm has the larger figure, and how many both have: a seed draws the same data for all."""
    mine, theirs = ({run["settings"]["seed"]: figure(run) for run in runs} for runs in (ours, baseline))
    pairs = [(found, theirs[seed]) for seed, found in mine.items() if seed in theirs]
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    return sum(one > other for one, other in both), len(both)


def _soonness(run: Record) -> float | None:
    steps = steps_to_solve(run)
    return None if steps is None else -steps


def _solved(runs: Runs) -> str:
    return f"{sum(run['solved_at'] is not None for run in runs)} of {len(runs)}"
