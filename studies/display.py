"""The progress of runs: a bar for the table on a terminal, and a line for each run that ends."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from studies.campaign import Watch
from studies.run import Record, Run
from studies.table import Table


class Display:
    """The bar of a table's runs. `watch` receives the events of the runs."""

    def __init__(self, console: Console, workers: int) -> None:
        """Make the bar. It is shown inside `with display.progress`.

        Args:
            console: Where to show it.
            workers: Runs at a time.
        """
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn(f"{workers} at a time"),
            console=console,
            disable=not console.is_terminal,
        )
        self.watch = Watch(self._total, self._progress, self._done, self._timing)
        self.bar: TaskID | None = None
        self.going: dict[tuple[str, str, int, float], float] = {}
        self.ended = 0

    def _total(self, table: Table, runs: int, before: int) -> None:
        self.going, self.ended = {}, before
        self.bar = self.progress.add_task(table.name, total=runs, completed=before)
        if before:
            self.console.print(f"{table.name}: {before} of {runs} runs are finished already", highlight=False)

    def _progress(self, run: Run, done: float) -> None:
        self.going[_key(run)] = done
        self._move()

    def _done(self, run: Run, record: Record) -> None:
        self.going.pop(_key(run), None)
        self.ended += 1
        self._move()
        score = "no score" if record["score"] is None else f"score {record['score']:.4f}"
        self.console.print(
            f"{run.table}, {run.row}, rate {run.rate:g}, seed {run.seed}: {score} after {record['last_step']} steps "
            f"({record['end']}), {record['seconds']:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    def _timing(self, table: Table, done: float) -> None:
        assert self.bar is not None
        self.progress.update(self.bar, description=f"{table.name}: timing", total=1.0, completed=done)

    def _move(self) -> None:
        assert self.bar is not None
        self.progress.update(self.bar, completed=self.ended + sum(self.going.values()))


def _key(run: Run) -> tuple[str, str, int, float]:
    return run.table, run.row, run.seed, run.rate
