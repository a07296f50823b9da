"""The runs of a table: first those that choose learning rates, then the seeds. Finished runs are not repeated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from studies import pool, records, timing
from studies.run import Record, Run
from studies.table import Table


@dataclass(frozen=True)
class Watch:
    """Callbacks for the progress of runs.

    Attributes:
        total: Called with the number of runs of a table, and how many of them are finished already.
        progress: Called with how much of a run is done, from 0 to 1.
        done: Called with the record of each run that ends.
        timing: Called with how much of the timing of a table's rows is done, from 0 to 1.
    """

    total: Callable[[Table, int, int], None] = lambda table, runs, before: None
    progress: pool.Progress = lambda run, done: None
    done: Callable[[Run, Record], None] = lambda run, record: None
    timing: Callable[[Table, float], None] = lambda table, done: None


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
    """Perform the runs of a table that are not finished; then time a step of each row, all in turns.

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
    every = table.training.rates
    first = {row: table.rate_runs(row) if len(every) > 1 else [] for row in rows}
    _announce(table, first, seeds, directory, watch)
    _perform([run for runs in first.values() for run in runs], directory, workers, environment, watch, trial=True)
    best = {row: _best(runs, directory)[: table.finalists] if runs else list(every) for row, runs in first.items()}
    second = {row: table.final_runs(row, best[row]) if runs else [] for row, runs in first.items()}
    _perform([run for runs in second.values() for run in runs], directory, workers, environment, watch, trial=True)
    rates = {row: _choose(first[row] + second[row], best[row], directory) for row in rows}
    counted = [table.run(row, seed, rates[row]) for row in rows for seed in seeds]
    for run in counted:  # a trial of the chosen rate counts, if its seed is asked for
        if (record := records.finished(directory, run, trial=True)) is not None:
            records.write(records.path(directory, run), record)
    _perform(counted, directory, workers, environment, watch, trial=False)
    _time(table, {row: table.run(row, 0, rates[row]) for row in rows}, directory, environment, watch)


def _time(
    table: Table, runs: Mapping[str, Run], directory: Path, environment: Mapping[str, object], watch: Watch
) -> None:
    """Time a step of each row that has records, if one of these rows has not been timed together with all others."""
    if runs.keys() <= records.step_seconds(directory, table.name).keys():
        return
    found, steps = records.load(directory).get(table.name, {}), timing.steps(table)
    past = {row: table.run(row, 0, every[0]["settings"]["rate"]) for row, every in found.items() if row in table.rows}
    seconds = timing.measure(list((past | dict(runs)).values()), steps, lambda done: watch.timing(table, done))
    settings = {"table": table.name, "steps": steps}
    record = {"settings": settings, "seconds": seconds, "environment": environment}
    records.write(directory / table.name / records.SECONDS, record)


def _announce(
    table: Table, first: Mapping[str, list[Run]], seeds: Sequence[int], directory: Path, watch: Watch
) -> None:
    """Tell how many runs there are, and how many of them are finished."""
    every = table.training.rates
    trials = [run for runs in first.values() for run in runs]
    possible = [run for row, runs in first.items() if runs for run in table.final_runs(row, every)]
    finals = len(possible) * table.finalists // len(every)
    tried = {(run.row, run.seed) for run in (*trials, *possible)}
    further = [table.run(row, seed, every[0]) for row in first for seed in seeds if (row, seed) not in tried]
    before = sum(records.finished(directory, run, trial=True) is not None for run in trials)
    before += min(finals, sum(records.finished(directory, run, trial=True) is not None for run in possible))
    before += sum(records.path(directory, run).exists() for run in further)
    watch.total(table, len(trials) + finals + len(further), before)


def _perform(
    runs: list[Run], directory: Path, workers: int, environment: Mapping[str, object], watch: Watch, *, trial: bool
) -> None:
    missing = [run for run in runs if records.finished(directory, run, trial=trial) is None]
    for run, record in pool.records(missing, workers, watch.progress):
        records.write(records.path(directory, run, trial=trial), {**record, "environment": environment})
        watch.done(run, record)


def _best(runs: list[Run], directory: Path) -> list[float]:
    return records.best_rates([records.read(records.path(directory, run, trial=True)) for run in runs])


def _choose(runs: list[Run], rates: Sequence[float], directory: Path) -> float:
    """The best of these learning rates, by the runs that tried it; the only one if no run did."""
    if not runs:
        return rates[0]
    rate = _best([run for run in runs if run.rate in rates], directory)[0]
    outcome: dict[str, list[Record]] = {}
    for run in runs:
        record = records.read(records.path(directory, run, trial=True))
        shown = {key: record[key] for key in ("score", "solved_at", "end")}
        outcome.setdefault(f"{run.rate:g}", []).append({"seed": run.seed, **shown})
    records.write(records.path(directory, runs[0]).with_name(records.CHOICE), {"chosen": rate, "tried": outcome})
    return rate
