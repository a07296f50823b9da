"""`implicit-attention train`: a language model from a text, on one machine or many."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from implicit_attention.cli import output
from implicit_attention.cli.environment import environment
from implicit_attention.cli.faults import first_process, one_line
from implicit_attention.errors import counted
from implicit_attention.inspection import plots
from implicit_attention.training.faults import RunError, SettingError, unwritable
from implicit_attention.training.resolving import read_yaml
from implicit_attention.training.settings import FIELDS, FLAGS, PRESETS, UPTRAINING, Settings, flag, plain_type

if TYPE_CHECKING:
    from implicit_attention.training.run import Result

CURVE, SUMMARY = "loss.png", "summary.json"


def train(*, config: Path | None, resume: bool, **flags: Any) -> None:
    """Train a byte-level language model, and measure bits per byte on held-out text.

    Without options, [bold]implicit-attention train[/bold] learns the source of Python's standard library, in minutes on
    two CPU cores. Add [bold]--attention ordinary[/bold] for the model to compare with.

    A setting comes from its flag, else from the --config file, else from the preset. The file is YAML and uses the
    names of the flags, such as [bold]learning_rate: 0.001[/bold].

    The directory of the run gets checkpoints, TensorBoard logs, loss.png, summary.json and the model. Load the model
    with [bold]implicit-attention generate[/bold] or with transformers' from_pretrained. To continue a run that was
    interrupted, use [bold]--resume --out DIR[/bold].

    With [bold]--from DIR[/bold] a model that is trained already learns on: an ordinary decoder is converted first (see
    [bold]implicit-attention convert[/bold]). [bold]--layers none --train lora[/bold] is the model to compare with.

    On several devices, run [bold]torchrun --nproc-per-node 8 -m implicit_attention.cli train ...[/bold], or use
    accelerate launch. --fsdp shards the weights. Press Ctrl-C to stop.
    """
    with one_line("train"):
        from implicit_attention.training import run

        said = {name: value for name, value in flags.items() if value is not None}
        file = read_yaml(config) if config else {}
        with _as_typed(file.keys() - said.keys()):
            plan = run.plan(said, file, resume=resume)
        settings = plan.settings
        made = not settings.directory.exists()
        if first_process():
            _prepare(settings.directory)
        console = Console(stderr=True)
        try:
            with _as_typed(file.keys() - said.keys()):
                result = _run(run.run, plan, console)
        except KeyboardInterrupt:
            _interrupted(settings)
        except RunError:
            if made and first_process():
                with suppress(OSError):  # it holds something
                    settings.directory.rmdir()
            raise
        if result is not None:
            _report(settings, result)


@contextmanager
def _as_typed(in_file: Set[str]) -> Iterator[None]:
    """Name a setting by its flag in a message, unless it comes from the YAML file."""
    try:
        yield
    except SettingError as fault:
        name = FLAGS.get(fault.setting, fault.setting)
        if name in in_file:
            raise
        raise RunError(f"{flag(name)}: {fault.sentence}") from None


def _prepare(directory: Path) -> None:
    try:
        output.prepare(directory, (CURVE, SUMMARY))
    except OSError as error:
        raise unwritable("--out", directory, error) from None


def _run(run: Callable[..., "Result | None"], plan: Any, console: Console) -> "Result | None":
    if not first_process():
        return run(plan, say=lambda sentence: None)
    from implicit_attention.cli.progress import Display

    display = Display(console)
    with display.progress:
        return run(plan, say=display.say, callbacks=[display.callback()])


def _interrupted(settings: Settings) -> None:
    from implicit_attention.training.checkpoint import checkpoints, resuming

    if first_process():
        if checkpoints(settings.directory):
            end = f"; to continue: {resuming(settings.directory)}"
        else:
            end = " before the first checkpoint: start again with the same command"
        print(f"\nstopped{end}", file=sys.stderr)
    raise typer.Exit(130) from None


def _report(settings: Settings, result: "Result") -> None:
    """Write the curve and the summary, and print the result."""
    curves = {
        "training": _curve(result.history, "bits_per_byte"),
        "held out (sample)": _curve(result.history, "eval_bits_per_byte"),
        "held out": _curve(result.history, "final_bits_per_byte"),
    }
    summary = {**environment(), "settings": asdict(settings), **asdict(result)}
    directory = settings.directory
    try:
        output.write_figure(directory / CURVE, plots.learning({n: c for n, c in curves.items() if c}))
        output.write(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise unwritable("--out", directory, error) from None
    print(
        f"held out: {result.bits_per_byte:.4f} bits per byte ({settings.kind}, "
        f"{counted(settings.steps, 'step')}, seed {settings.seed}, {counted(result.parameters, 'weight')}, "
        f"{counted(result.held_out_bytes, 'byte')}); the model is in {directory}"
    )


def _curve(history: Any, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in history if name in entry}


def _option(name: str) -> inspect.Parameter:
    """One flag, made from the metadata of its setting. Its default is None: not given."""
    field = FIELDS[name]
    kind, words = plain_type(name)
    spelled = flag(name)
    option = typer.Option(
        f"{spelled}/--no-{spelled[2:]}" if kind is bool else spelled,
        help=field.metadata["help"] + escape(f" [default: {_defaults(name)}]"),
        rich_help_panel=field.metadata["panel"],
        show_default=False,
        metavar="|".join(words) or field.metadata["metavar"],
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _defaults(name: str) -> str:
    """A default for the help page, with those of the presets where they differ."""
    default = FIELDS[name].default
    others = {preset: values[name] for preset, values in PRESETS.items() if values.get(name, default) != default}
    if UPTRAINING.get(name, default) != default:
        others["--from"] = UPTRAINING[name]
    if name == "out":
        return "runs/PRESET-ATTENTION-seedSEED"
    shown = {False: "no", True: "yes"}.get(default, default) if isinstance(default, bool) else default
    return ", ".join([f"{shown}", *(f"{value} with {preset}" for preset, value in others.items())])


_CONFIG = typer.Option("--config", help="YAML file with settings.", rich_help_panel="Run", metavar="FILE.yaml")
_RESUME = typer.Option("--resume", help="Continue from the last checkpoint in --out.", rich_help_panel="Run")
_PARAMETERS = [
    *map(_option, FIELDS),
    inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, _CONFIG]
    ),
    inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _RESUME]),
]
# Typer reads the signature. Every setting becomes a flag, so flags, YAML file and checkpoints have the same names.
train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
