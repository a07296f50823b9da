"""`python -m studies`: train arms on small tasks, and make the page of results."""

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
from studies.commit import checked_out

if TYPE_CHECKING:
    from studies.run import Record
    from studies.table import Table

    Plan = tuple[Table, list[str], list[int]]

RECORDS, DOCS = Path("docs/data/eval"), Path("docs")
_PAGE_ONLY = {"TFLOPs to solve", "of all rates", "parameters", "GFLOPs a step"}  # a terminal has 80 columns

_TASK = typer.Argument(
    help="A table (recall-64) or a group of them (recall); [bold]list[/bold] shows all.", show_default=False
)
_ARM = typer.Option("--arm", help=escape("An arm; can be repeated. [default: all of the table's]"), show_default=False)
_SEEDS = typer.Option(
    "--seeds", help=escape("Such as 0-4 or 0,2,5. [default: the table's own]"), show_default=False, metavar="FIRST-LAST"
)
_OUT = typer.Option(
    "--out",
    help=escape("Directory for records, page and pictures. [default: runs/eval-BUDGET; with --all --budget cpu: docs]"),
    show_default=False,
    metavar="DIR",
)
_BUDGET = typer.Option("--budget", help="smoke (a quick check, seconds) or cpu (hours on two cores).")
_ALL = typer.Option("--all", help="Make all tables.")
_WORKERS = typer.Option(
    "--workers", min=1, help=escape("Runs at once. [default: one for each core]"), show_default=False
)


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
    """Train small models that differ only in their attention, and compare what they learn.

    [bold]implicit-attention eval recall-64 --arm ordinary --arm implicit --seeds 0-4[/bold] compares two arms on
    looking up 4 pairs in 64 tokens. Each arm's learning rate is the best of several; the page says how it is chosen.

    Every run writes a JSON record, OUT/TABLE/ARM/seed-N.json: settings, versions, parameters, FLOPs, seconds, solver
    statistics and the whole curve. Finished runs are not repeated, so the same command continues one that was stopped.
    The same seed gives the same figures, however many runs are made at once.

    At the end, prints a table (mean ± standard deviation, seeds solved) and writes OUT/results.md and OUT/images.

    [bold]implicit-attention eval list[/bold] shows tables and arms.

    [bold]implicit-attention eval --all --budget cpu[/bold] makes docs/results.md of this checkout. It makes the runs
    that are missing in docs/data/eval.
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
        raise RunError("name a task, or use --all; `implicit-attention eval list` shows all tasks")
    return list(suite.tables(budget).values()) if task is None else suite.chosen(budget, task)


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn an invalid value into one line, without a traceback."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def _places(out: Path | None, budget: str, every: bool) -> tuple[Path, Path]:
    """The directories of records and of the page."""
    if every and out is None and budget == "cpu":
        if not DOCS.is_dir():
            raise RunError(
                "--all writes docs/results.md of a checkout: run it from the root of the checkout, or use --out"
            )
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
    machine, display = {**environment(), "commit": checked_out()}, Display(Console(stderr=True), workers)
    try:
        with display.progress:
            for plan in plans:
                campaign.perform(*plan, directory, workers=workers, environment=machine, watch=display.watch)
    except KeyboardInterrupt:
        print(f"\nstopped; finished runs are in {directory}: the same command continues from there")
        raise typer.Exit(130) from None
    found = records.load(directory)
    for table, rows, _ in plans:
        _show(table, {name: found[table.name][name] for name in rows})
    report.write(page, found, suite.tables(budget), budget)
    print(f"page: {page / 'results.md'}; records: {directory}")


def _prepare(directory: Path) -> None:
    try:
        output.prepare(directory, ())
    except OSError as error:
        raise unwritable("--out", directory, error) from None


def _show(table: "Table", rows: "dict[str, list[Record]]") -> None:
    """Print the table of the page."""
    from studies.cells import cells

    head, *lines = cells(table, rows)
    kept = [i for i, name in enumerate(head) if name not in _PAGE_ONLY]
    columns = [escape(head[i]) for i in kept[1:]]
    grid = Grid(Column(head[0], no_wrap=True), *columns, title=escape(table.title), title_justify="left")
    for name, line in zip(rows, lines, strict=True):
        grid.add_row(name, *(escape(line[i]) for i in kept[1:]))
    Console().print(grid)


def _list(tables: "dict[str, Table]") -> None:
    """Print the tables, and what their arms are."""
    from studies import report

    grid = Grid("group", "table", "title", Column("arms", overflow="fold"), "seeds")
    for table in tables.values():
        grid.add_row(table.group, table.name, escape(table.title), " ".join(table.rows), str(table.seeds))
    Console().print(grid)
    _, *lines = report.names([(table, list(table.rows)) for table in tables.values()])
    legend = Grid("arm", Column("names", overflow="fold"))
    for title, called in lines:
        legend.add_row(escape(title), called.replace("`", ""))
    Console().print(legend)
