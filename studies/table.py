"""A table of the results: runs that are compared with each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from implicit_attention.tasks.task import Task
from studies.arms import ARMS, Sizes
from studies.names import known
from studies.run import Run, Training


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        arm: Name of the arm.
        title: Its name on the page.
        sizes: Sizes of its model.
        lengthened: Its steps, as a multiple of the table's, where the arm is cheaper than others and trains for as
            many seconds as they do.
    """

    arm: str
    title: str
    sizes: Sizes
    lengthened: float = 1.0


@dataclass(frozen=True)
class Table:
    """Runs that are compared with each other.

    Attributes:
        name: Its name in commands and files.
        group: Name of the group of tables it belongs to.
        title: Its heading.
        task: The task that is learned.
        rows: Its rows by name.
        training: How they are trained.
        seeds: Number of seeds, from 0 on, that choose the learning rate and are shown.
        finalists: How many learning rates all seeds try: those that are best for the first seed, which tries all.
    """

    name: str
    group: str
    title: str
    task: Task
    rows: Mapping[str, Row]
    training: Training
    seeds: int
    finalists: int = 2

    def run(self, row: str, seed: int, rate: float) -> Run:
        """Return a run of the table.

        Args:
            row: Name of the row.
            seed: Of the run.
            rate: The learning rate that was chosen.

        Raises:
            ValueError: If there is no such row.
        """
        entry = self.rows[known("arm", row, self.rows)]
        training = replace(self.training, steps=round(self.training.steps * entry.lengthened))
        return Run(self.name, row, entry.arm, self.task, entry.sizes, training, rate, seed)

    def rate_runs(self, row: str) -> list[Run]:
        """Return the runs that try all learning rates of a row, all of the first seed.

        Args:
            row: Name of the row.

        Raises:
            ValueError: If there is no such row.
        """
        return [self.run(row, 0, rate) for rate in self.training.rates]

    def final_runs(self, row: str, rates: Sequence[float]) -> list[Run]:
        """Return the runs of the seeds after the first at the rates that were best for it.

        Args:
            row: Name of the row.
            rates: Those learning rates.

        Raises:
            ValueError: If there is no such row.
        """
        return [self.run(row, seed, rate) for rate in rates for seed in range(1, self.seeds)]


def rows_of(names: tuple[str, ...], sizes: Sizes) -> dict[str, Row]:
    """Return a row for each arm, all of the same sizes.

    Args:
        names: Of the arms.
        sizes: Of their models.
    """
    return {name: Row(name, ARMS[name].title, sizes) for name in names}
