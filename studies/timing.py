"""How long a training step of each row of a table takes: the rows take turns in one process."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

from studies.run import Course, Run, on_one_thread
from studies.table import Table

STEPS = 60  # of each row under a causal mask: what a step costs there stays the same
WARMING = 20  # of these, steps that do not count


def steps(table: Table) -> int:
    """Return how many steps of each row are timed.

    Args:
        table: The table. Without a causal mask it is the whole training: solvers take more steps as weights grow.
    """
    return min(STEPS, table.training.steps) if table.task.is_causal else table.training.steps


@on_one_thread()
def measure(runs: Sequence[Run], count: int, tell: Callable[[float], None]) -> dict[str, float]:
    """Return the processor's seconds of a training step, a median, by row.

    Args:
        runs: One run of each row.
        count: Steps of each, at most those of its training.
        tell: Called with how much is done, from 0 to 1.
    """
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
    return {row: statistics.median(each[WARMING:] or each) for row, each in spent.items()}
