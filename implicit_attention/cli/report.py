"""The demo's figures, as entries of `summary.json` and as text for the terminal."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from implicit_attention.cli import stages
from implicit_attention.tasks import Recall

SOLVED = 0.99  # accuracy at which recall counts as learned


def example_figures(example: stages.SeedExample) -> dict[str, Any]:
    """Return the summary of the original example."""
    return {"differences": example.differences, "gradient": example.gradient.tolist()}


def case_figures(case: stages.TextCase, results: list[stages.Settled]) -> dict[str, Any]:
    """Return the summary of one case, with an entry for each solver."""
    batch, length, embed_dim = case.x.shape
    return {
        "case": case.name,
        "shape": [batch, length, embed_dim],
        "layer": case.layer.extra_repr(),
        "spectral_radius": case.radius.tolist(),
        "solvers": [_solver_figures(case, result) for result in results],
    }


def _solver_figures(case: stages.TextCase, result: stages.Settled) -> dict[str, Any]:
    solution = result.solution
    return {
        "solver": result.solver,
        "settings": str(stages.SOLVERS[result.solver]),
        "steps": solution.steps.flatten(1).amax(1).tolist(),
        "evaluations": solution.evaluations,
        "residual": float(solution.residual.max()),
        "converged": solution.converged.flatten(1).all(1).tolist(),
        "seconds": result.seconds,
        "trace": solution.abs_trace.flatten(1).amax(1).tolist(),
    }


def race_figures(entrants: dict[str, stages.Runner], task: Recall) -> dict[str, Any]:
    """Return the summary of training."""
    return {"task": vars(task), "models": {name: _runner_figures(runner) for name, runner in entrants.items()}}


def _runner_figures(runner: stages.Runner) -> dict[str, Any]:
    steps = runner.steps
    return {
        "layer": f"{type(runner.model.attention).__name__}({runner.model.attention.extra_repr()})",
        "parameters": runner.parameters,
        "accuracy": list(runner.curve.values())[-1],
        "solved_at_step": runner.first(SOLVED),
        "seconds": steps[-1].seconds,
        "largest_solver_steps": max(s.solver_steps for s in steps),
        "steps_with_unconverged_systems": sum(s.unconverged > 0 for s in steps),
        "unconverged_share": sum(s.unconverged for s in steps) / len(steps),
        "largest_residual": max(s.residual for s in steps),
        "steps": [vars(s) for s in steps],
    }


def failures(summary: dict[str, Any]) -> list[str]:
    """Return a sentence for everything that did not converge."""
    found = []
    for case in summary["text"]:
        for row in case["solvers"]:
            missed = row["converged"].count(False)
            if missed:
                found.append(
                    f"{row['solver']} did not settle {missed} of {len(row['converged'])} texts, {case['case']}, "
                    f"in {max(row['steps'])} steps (residual {row['residual']:.1e})."
                )
    for name, model in summary["recall"]["models"].items():
        if model["steps_with_unconverged_systems"]:
            found.append(
                f"{name}: {model['steps_with_unconverged_systems']} of {len(model['steps'])} training steps had "
                f"unconverged rows ({model['unconverged_share']:.2%} of all rows)."
            )
    return found


def opening(console: Console, settings: dict[str, Any], seed: int, *, quick: bool) -> None:
    """Print what runs, with versions, threads and seed."""
    versions = settings["versions"]
    console.print(
        "[bold]implicit-query attention[/bold]: queries are made from the output, so y = F(y)", highlight=False
    )
    console.print(
        f"implicit-attention {versions['implicit-attention']}, torch {versions['torch']}, "
        f"threads: {settings['threads']}, seed: {seed}",
        style="dim",
        highlight=False,
    )
    if quick:
        console.print("quick: fewer training steps, shorter text, each solver timed once", style="yellow")


def results(console: Console, summary: dict[str, Any], files: Iterable[Path]) -> None:
    """Print the results."""
    _show_example(console, summary["seed_example"])
    for case in summary["text"]:
        _show_case(console, case)
    _show_race(console, summary["recall"])
    for sentence in summary["failures"]:
        console.print(f"[yellow]Not converged:[/yellow] {sentence}", highlight=False)
    if summary["warnings"]:
        console.print(f"{len(summary['warnings'])} warnings; see above and summary.json.", style="yellow")
    console.print(f"\nDone in {summary['seconds']:.0f} s. Written:", highlight=False)
    for path in files:
        console.print(Text(f"  {path}"), soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def _show_example(console: Console, example: dict[str, Any]) -> None:
    _heading(console, "1. The original example: 4 tokens of width 8, ten steps from y = V")
    differences = "  ".join(f"{d:.1e}" for d in example["differences"])
    console.print(f"|y_(t+1) - y_t|:  {differences}", highlight=False)
    console.print("gradient of sum(y) by x, through the ten steps:", highlight=False)
    for row in example["gradient"][0]:
        console.print("  " + " ".join(f"{g:8.4f}" for g in row), highlight=False)


def _show_case(console: Console, case: dict[str, Any]) -> None:
    batch, length, _ = case["shape"]
    _heading(console, f"2. {batch} x {length} bytes of Python's standard library: {case['case']}")
    radius = max(case["spectral_radius"])
    side = "plain iteration settles" if radius < 1 else "plain iteration does not settle"
    console.print(f"causal, 4 heads of 16; spectral radius {radius:.2f} ({side})", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("solver", "steps", "evaluations", "residual", "milliseconds", ""):
        table.add_column(name, justify="left" if name in ("solver", "") else "right")
    for row in case["solvers"]:
        settled = all(row["converged"])
        table.add_row(
            row["solver"],
            str(max(row["steps"])),
            str(row["evaluations"]),
            f"{row['residual']:.1e}",
            f"{1000 * row['seconds']:.1f}",
            "[green]settled[/green]" if settled else "[red]not settled[/red]",
        )
    console.print(table)


def _show_race(console: Console, recall: dict[str, Any]) -> None:
    task, models = recall["task"], recall["models"]
    _heading(console, f"3. Associative recall, {task['pairs']} pairs: which value came after this key?")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("one layer of", "weights", "held out", "99 % at step", "seconds", "unsettled"):
        table.add_column(name, justify="left" if name == "one layer of" else "right")
    for name, model in models.items():
        solves = model["largest_solver_steps"] > 0
        table.add_row(
            name,
            f"{model['parameters']:,}",
            f"{model['accuracy']:.1%}",
            str(model["solved_at_step"] or "never"),
            f"{model['seconds']:.1f}",
            f"{model['unconverged_share']:.2%}" if solves else "",
        )
    console.print(table)
    implicit = models[stages.IMPLICIT]
    console.print(
        f"All: {len(implicit['steps'])} steps of AdamW on the same data. Held out: share of right answers on new "
        "sequences. Unsettled: share of rows above tolerance in training.\n"
        "One ordinary layer does not learn recall; one with a convolution on its keys does. A convolution binds a "
        "value to its key by position: here the key is always the token before.\n"
        f"{implicit['layer']}",
        style="dim",
        highlight=False,
        markup=False,
    )
