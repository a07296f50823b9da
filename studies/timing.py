"""How long a training step of each row of a table takes: the rows take turns in one process."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from studies import records
from studies.run import Course, Record, Run
from studies.table import Table

STEPS = 60  # of each row under a causal mask: what a step costs there stays the same
WARMING = 20  # of these, steps that do not count


def steps(table: Table) -> int:
    """Return how many steps of each row are timed.

    Args:
        table: The table. Without a causal mask it is the whole training: solvers take more steps as weights grow.
    """
    return min(STEPS, table.training.steps) if table.task.is_causal else table.training.steps


def measure(runs: Sequence[Run], count: int, tell: Callable[[float], None]) -> dict[str, float]:
    """Return the processor's seconds of a training step, a median, by row.

    Args:
        runs: One run of each row.
        count: Steps of each, at most those of its training.
        tell: Called with how much is done, from 0 to 1.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            courses = {run.row: Course(run) for run in runs}
            spent: dict[str, list[float]] = {row: [] for row in courses}
            for step in range(count):
                for row in list(courses):
                    begun = time.process_time()
                    loss = courses[row].step()
                    spent[row].append(time.process_time() - begun)
                    if not math.isfinite(loss):
                        del courses[row]  # diverged: its further steps would say nothing
                tell((step + 1) / count)
    finally:
        torch.set_num_threads(threads)
    return {row: statistics.median(each[WARMING:] or each) for row, each in spent.items()}


def path(directory: Path, table: Table) -> Path:
    """Return where the seconds of a table are kept.

    Args:
        directory: Where records are kept.
        table: The table.
    """
    return directory / table.name / records.SECONDS


def lacking(directory: Path, table: Table, rows: Sequence[str]) -> bool:
    """Return whether a row has no seconds that were taken together with those of all others.

    Args:
        directory: Where records are kept.
        table: The table.
        rows: Names of rows.
    """
    file = path(directory, table)
    return not file.exists() or not set(rows) <= records.read(file)["seconds"].keys()


def record(table: Table, seconds: dict[str, float], environment: object) -> Record:
    """Return the record of a measurement.

    Args:
        table: The table.
        seconds: From `measure`.
        environment: Versions and machine.
    """
    return {
        "settings": {"table": table.name, "steps": steps(table)}, "seconds": seconds, "environment": environment
    }  # fmt: skip
