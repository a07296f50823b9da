"""`implicit-attention demo`: the original example, solvers on real text, and three small models trained live."""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from implicit_attention.cli import output, report, stages
from implicit_attention.cli.environment import environment
from implicit_attention.cli.faults import one_line
from implicit_attention.inspection import plots
from implicit_attention.tasks import Recall, standard_library_files
from implicit_attention.training.faults import RunError, unwritable

FILES = ("convergence.png", "recall.png", "attention.png", "summary.json")


@dataclass(frozen=True)
class Scale:
    """How much work the demo does.

    Attributes:
        training_steps: Training steps of each model.
        length: Bytes in a window of text.
        repeats: Timed solves of each solver.
    """

    training_steps: int
    length: int
    repeats: int


FULL, QUICK = Scale(400, 256, 3), Scale(160, 128, 1)


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for pictures and figures. It is made if it does not exist.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all weights and data.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"Train {QUICK.training_steps} steps instead of {FULL.training_steps}, "
            f"use {QUICK.length} bytes of text instead of {FULL.length}, and time each solver once.",
        ),
    ] = False,
) -> None:
    """Show how implicit-query attention settles, and train it next to ordinary attention.

    Part 1 runs the original example: ten steps and a gradient. Part 2 compares six solvers on a real text, the source
    of Python's standard library. Part 3 trains three layers on associative recall: ordinary attention, the same with a
    convolution on its keys, and implicit-query attention, with as many parameters and on the same data.

    Writes convergence.png, recall.png, attention.png and summary.json, which has every figure shown.
    """
    with one_line("demo"):
        _check(out)
    run(out, seed, QUICK if quick else FULL, Console())


def _check(out: Path) -> None:
    """Refuse a directory that cannot be written to, and a Python without its library's source."""
    try:
        standard_library_files()
    except FileNotFoundError as error:
        raise RunError(f"{error}. Use a Python that has it") from None
    try:
        output.prepare(out, FILES)
    except OSError as error:
        raise unwritable("--out", out, error) from None


def run(out: Path, seed: int, scale: Scale, console: Console) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: Directory to write to.
        seed: Seed of all weights and data.
        scale: How much work to do.
        console: Where to print.

    Returns:
        What `summary.json` holds.
    """
    begun = time.perf_counter()
    settings = environment()
    report.opening(console, settings, seed, quick=scale == QUICK)
    with _progress(console) as progress, _noted(progress.console) as notes:
        example = stages.seed_example(seed)
        settled = _settle_all(progress, seed, scale)
        task = Recall()
        entrants = stages.runners(seed, task)
        _race(progress, entrants, task, scale.training_steps, seed)
        maps, tokens = stages.attention_maps(entrants[stages.IMPLICIT], task, seed)
    summary: dict[str, Any] = {
        **settings,
        "seed": seed,
        "quick": scale == QUICK,
        "scale": vars(scale),
        "seed_example": report.example_figures(example),
        "text": [report.case_figures(case, results) for case, results in settled],
        "recall": report.race_figures(entrants, task),
        "warnings": notes,
    }
    summary["failures"] = report.failures(summary)
    _draw(out, example, settled, entrants, (maps, tokens), task)
    summary["seconds"] = time.perf_counter() - begun
    output.write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report.results(console, summary, [out / name for name in FILES])
    return summary


Results = list[tuple[stages.TextCase, list[stages.Settled]]]


def _settle_all(progress: Progress, seed: int, scale: Scale) -> Results:
    bar = progress.add_task("solvers on a real text", total=2 * len(stages.SOLVERS), note="")
    settled: Results = []
    for case in stages.text_cases(seed, length=scale.length):
        results = []
        for name in stages.SOLVERS:
            progress.update(bar, note=f"{name}, {case.name}")
            results.append(stages.settle(case, name, repeats=scale.repeats))
            progress.advance(bar)
        settled.append((case, results))
    progress.update(bar, note="")
    return settled


def _race(progress: Progress, entrants: dict[str, stages.Runner], task: Recall, steps: int, seed: int) -> None:
    bars = {name: progress.add_task(f"recall: {name}", total=steps, note="") for name in entrants}
    for name, step in stages.race(entrants, task, steps=steps, seed=seed):
        progress.advance(bars[name])
        if step.accuracy is not None:
            progress.update(bars[name], note=f"{step.accuracy:6.1%} right")


def _draw(
    out: Path,
    example: stages.SeedExample,
    settled: Results,
    entrants: dict[str, stages.Runner],
    attention: tuple[dict[str, Any], list[str]],
    task: Recall,
) -> None:
    case, results = settled[-1]
    # A direct solver has no trace to draw: it measures its residual once, at the end.
    traced = [r for r in results if len(r.solution.abs_trace) > 1]
    worst = {r.solver: r.solution.abs_trace.flatten(1).amax(1) for r in traced}
    panels: dict[str, plots.Trace | Mapping[str, plots.Trace]] = {
        "The original example": {"|y$_{t+1}$ - y$_t$|": example.differences},
        f"Real text, {case.name}": worst,
    }
    output.write_figure(out / "convergence.png", plots.convergence(panels))
    curves = {name: runner.curve for name, runner in entrants.items()}
    output.write_figure(out / "recall.png", plots.recall(curves, guess=1 / task.pairs))
    maps, tokens = attention
    means = {title: weights.mean(0) for title, weights in maps.items()}
    output.write_figure(out / "attention.png", plots.attention(means, tokens=tokens))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def _noted(console: Console) -> Iterator[list[str]]:
    """Print warnings above the progress bars, and yield the list of them."""
    notes: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        notes.append(f"{category.__name__}: {message}")
        console.print(f"[yellow]{category.__name__}[/yellow]: {message}", highlight=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield notes
