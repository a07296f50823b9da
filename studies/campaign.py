"""The runs of a table: first those that choose learning rates, then the seeds. Finished runs are not repeated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from studies import pool, records
from studies.run import Record, Run
from studies.table import Table


@dataclass(frozen=True)
class Watch:
    """Callbacks for the progress of runs.

    Attributes:
        total: Called with the number of runs of a table, and how many of them are finished already.
        progress: Called with how much of a run is done, from 0 to 1.
        done: Called with the record of each run that ends.
    """

    total: Callable[[Table, int, int], None] = lambda table, runs, before: None
    progress: pool.Progress = lambda run, done: None
    done: Callable[[Run, Record], None] = lambda run, record: None


def perform(
    table: Table,
    rows: Sequence[str],
    seeds: Sequence[int],
    directory: Path,
    *,
    workers: int,
    environment: Mapping[str, object],
    watch: Watch,
) -> None:
    """Perform the runs of a table that are not finished.

    Args:
        table: The table.
        rows: Names of its rows.
        seeds: Which seeds.
        directory: Where records are kept.
        workers: Processes at once.
        environment: Versions and machine, stored in each record.
        watch: Receives the progress.

    Raises:
        ValueError: If there is no such row, or the directory holds runs of other settings.
        RuntimeError: If a run failed.
    """
    choices = {row: table.rate_runs(row) for row in rows}
    trials = [run for runs in choices.values() if _rates(runs) > 1 for run in runs]
    planned = [table.run(row, seed, table.training.rates[0]) for row in rows for seed in seeds]
    tried = {(run.row, run.seed) for run in trials}
    further = [run for run in planned if (run.row, run.seed) not in tried]
    before = sum(records.finished(directory, run, trial=True) is not None for run in trials)
    before += sum(records.path(directory, run).exists() for run in further)
    watch.total(table, len(trials) + len(further), before)
    _perform(trials, directory, workers, environment, watch, trial=True)
    rates = {row: _choose(runs, directory) for row, runs in choices.items()}
    counted = [table.run(row, seed, rates[row]) for row in rows for seed in seeds]
    for run in counted:  # a trial of the chosen rate counts, if its seed is asked for
        if (record := records.finished(directory, run, trial=True)) is not None:
            records.write(records.path(directory, run), record)
    _perform(counted, directory, workers, environment, watch, trial=False)


def _perform(
    runs: list[Run], directory: Path, workers: int, environment: Mapping[str, object], watch: Watch, *, trial: bool
) -> None:
    missing = [run for run in runs if records.finished(directory, run, trial=trial) is None]
    for run, record in pool.records(missing, workers, watch.progress):
        records.write(records.path(directory, run, trial=trial), {**record, "environment": environment})
        watch.done(run, record)


def _choose(runs: list[Run], directory: Path) -> float:
    """The learning rate of a row, from the runs that try several; the only one if there is no choice."""
    if _rates(runs) == 1:
        return runs[0].rate
    tried = [records.read(records.path(directory, run, trial=True)) for run in runs]
    rate = records.best_rate(tried)
    outcome: dict[str, list[Record]] = {}
    for record in tried:
        shown = {key: record[key] for key in ("score", "solved_at", "end")}
        outcome.setdefault(f"{record['settings']['rate']:g}", []).append({"seed": record["settings"]["seed"], **shown})
    records.write(records.path(directory, runs[0]).with_name(records.CHOICE), {"chosen": rate, "tried": outcome})
    return rate


def _rates(runs: list[Run]) -> int:
    return len({run.rate for run in runs})
