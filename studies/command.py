"""`python -m studies`: small tasks, arm against arm, and the page of their results."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column
from rich.table import Table as Grid

from implicit_attention.cli import output
from implicit_attention.cli.environment import environment
from implicit_attention.cli.faults import one_line
from implicit_attention.training.faults import RunError, unwritable

if TYPE_CHECKING:
    from studies.run import Record
    from studies.suite import Table

    Plan = tuple[Table, list[str], list[int]]

RECORDS, DOCS = Path("docs/data/eval"), Path("docs")

_TASK = typer.Argument(
    help="A table (recall-64) or a group of them (recall); [bold]list[/bold] shows all.", show_default=False
)
_ARM = typer.Option("--arm", help="An arm; may be repeated. [default: all of the table's]", show_default=False)
_SEEDS = typer.Option(
    "--seeds", help="Such as 0-4 or 0,2,5. [default: the table's own]", show_default=False, metavar="FIRST-LAST"
)
_OUT = typer.Option(
    "--out",
    help="Where JSON, page and pictures go. [default: runs/eval-BUDGET; with --all --budget cpu: docs]",
    show_default=False,
    metavar="DIR",
)
_BUDGET = typer.Option("--budget", help="smoke (does it work?) or cpu (two cores, hours).")
_ALL = typer.Option("--all", help="All tables.")
_WORKERS = typer.Option("--workers", min=1, help="Runs at a time. [default: one for each core]", show_default=False)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def evaluate(
    task: Annotated[str | None, _TASK] = None,
    arm: Annotated[list[str] | None, _ARM] = None,
    seeds: Annotated[str | None, _SEEDS] = None,
    out: Annotated[Path | None, _OUT] = None,
    budget: Annotated[str, _BUDGET] = "cpu",
    every: Annotated[bool, _ALL] = False,
    workers: Annotated[int | None, _WORKERS] = None,
) -> None:
    """Train small models that differ in their attention alone, and compare what they learn.

    [bold]implicit-attention eval recall-64 --arm ordinary --arm implicit --seeds 0-4[/bold] asks which of the two
    learns to look up 4 pairs in 64 tokens. Each arm's learning rate is chosen first, on a seed of its own.

    Every run leaves a file of JSON, OUT/TABLE/ARM/seed-N.json: settings, versions, parameters, FLOPs, seconds, how
    equilibria were solved, the whole curve. A run whose file is there is not done again: a command that was
    stopped goes on when it is given once more. The same seed gives the same figures, however many runs go at once.

    At the end come a table (mean ± standard deviation, seeds solved), OUT/results.md and OUT/images.

    [bold]implicit-attention eval list[/bold] shows tables and arms.

    [bold]implicit-attention eval --all --budget cpu[/bold] makes docs/results.md of this checkout, from runs that it
    does where docs/data/eval lacks them.
    """
    with one_line("eval"), _sentences():
        from studies import suite

        if task == "list" and not every:
            _list(suite.tables(budget))
            return
        tables = _tables(task, budget, every)
        records, page = _places(out, budget, every)
        plans = [(table, _rows(table, arm), _seeds(seeds, table)) for table in tables]
        _perform(plans, records, page, budget, workers or os.cpu_count() or 1)


def _tables(task: str | None, budget: str, every: bool) -> "list[Table]":
    from studies import suite

    if (task is None) != every:
        raise RunError("name a task, or say --all for all of them; `implicit-attention eval list` shows them")
    return list(suite.tables(budget).values()) if task is None else suite.chosen(budget, task)


@contextmanager
def _sentences() -> Iterator[None]:
    """A value that does not fit is the user's to change: its sentence is enough."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def _places(out: Path | None, budget: str, every: bool) -> tuple[Path, Path]:
    """Where records go, and where the page."""
    if every and out is None and budget == "cpu":
        if not DOCS.is_dir():
            raise RunError("--all writes docs/results.md of a checkout: run it from its root, or name another --out")
        return RECORDS, DOCS
    directory = out or Path("runs") / f"eval-{budget}"
    return directory, directory


def _rows(table: "Table", wanted: list[str] | None) -> list[str]:
    from studies.names import known

    return [known("arm", name, table.rows) for name in dict.fromkeys(wanted)] if wanted else list(table.rows)


def _seeds(text: str | None, table: "Table") -> list[int]:
    if text is None:
        return list(range(table.seeds))
    try:
        found = [seed for part in text.split(",") for seed in _range(part)]
    except ValueError:
        raise RunError(f"--seeds must look like 0-4 or 0,2,5, but got {text!r}") from None
    if not found:
        raise RunError(f"--seeds must name at least one seed, but got {text!r}")
    return list(dict.fromkeys(found))


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _perform(plans: "list[Plan]", directory: Path, page: Path, budget: str, workers: int) -> None:
    from studies import campaign, records, report, suite
    from studies.display import Display

    _prepare(directory)
    machine, display = environment(), Display(Console(stderr=True), workers)
    try:
        with display.progress:
            for plan in plans:
                campaign.perform(*plan, directory, workers=workers, environment=machine, watch=display.watch)
    except KeyboardInterrupt:
        print(f"\nstopped; what is done stays in {directory}: the same command goes on from there")
        raise typer.Exit(130) from None
    found = records.load(directory)
    for table, rows, _ in plans:
        _show(table, {name: found[table.name][name] for name in rows})
    report.write(page, found, suite.tables(budget))
    print(f"page: {page / 'results.md'}; records: {directory}")


def _prepare(directory: Path) -> None:
    try:
        output.prepare(directory, ())
    except OSError as error:
        raise unwritable("--out", directory, error) from None


def _show(table: "Table", rows: "dict[str, list[Record]]") -> None:
    """Print the page's table as a grid."""
    from studies import report

    head, *lines = report.cells(table, rows)
    grid = Grid(Column(head[0], no_wrap=True), *map(escape, head[1:]), title=escape(table.title), title_justify="left")
    for name, line in zip(rows, lines, strict=True):
        grid.add_row(name, *map(escape, line[1:]))
    Console().print(grid)


def _list(tables: "dict[str, Table]") -> None:
    grid = Grid("group", "table", "what", "arms", "seeds")
    for table in tables.values():
        grid.add_row(table.group, table.name, escape(table.title), " ".join(table.rows), str(table.seeds))
    Console().print(grid)
