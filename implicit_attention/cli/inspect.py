"""`implicit-attention inspect`: a report of a model's equilibria, as one file for a browser."""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from implicit_attention.cli import output
from implicit_attention.cli.faults import one_line
from implicit_attention.inspection.inspecting import implicit_layers, inspect
from implicit_attention.inspection.report import Report
from implicit_attention.seed import ImplicitQueryAttentionLinearV
from implicit_attention.training.faults import RunError, reason, unreadable, unwritable


def inspect_command(
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a run of [bold]implicit-attention train[/bold], or one of its checkpoints."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="A text, or a file that holds one.", metavar="TEXT|FILE")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.", metavar="FILE.html")] = Path("report.html"),
    seed_example: Annotated[
        bool, typer.Option("--seed-example", help="Inspect the original example instead of a model.")
    ] = False,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Only this implicit layer, counted from 0.", show_default="all"),
    ] = None,
) -> None:
    """Show what a model's implicit layers do with a text.

    Does each layer settle, where not, why, and what to do? The page shows what every token attends to at each
    iteration, residuals, gains and steps. It is one file, which loads nothing. The words are printed, too.
    """
    with one_line("inspect"):
        report = _write(out, model, text, layer, seed_example)
    print(report.summary)
    print(f"the page is {out}")


def _write(out: Path, model: Path | None, text: str | None, layer: int | None, seed_example: bool) -> Report:
    if seed_example == (model is not None):
        raise RunError("give either --model DIR or --seed-example")
    try:
        output.prepare(out.parent, (out.name,))
        report = _example(text, layer) if model is None else _of_model(model, text, layer)
        output.write(
            out, report.to_html(f"implicit-attention: {'the original example' if model is None else model.name}")
        )
    except OSError as error:
        raise unwritable("--out", out, error) from None
    except ModuleNotFoundError:
        raise
    except (ValueError, ImportError) as error:
        raise RunError(reason(error)) from None
    return report


def _example(text: str | None, layer: int | None) -> Report:
    """The original example: four random tokens of size eight."""
    if text is not None or layer is not None:
        raise RunError(f"--seed-example makes --{'layer' if text is None else 'text'} useless: leave it out")
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8)
    return inspect(ImplicitQueryAttentionLinearV(8), x)


def _of_model(directory: Path, text: str | None, layer: int | None) -> Report:
    from implicit_attention.training import generation

    content = _content(text)
    loaded = generation.load(directory, device="cpu")
    longest = loaded.config.max_position_embeddings
    if not 0 < len(content) <= longest:
        raise RunError(f"--text has {len(content)} bytes: the model's sequences have 1 to {longest}")
    names = implicit_layers(loaded)
    if layer is not None and layer >= len(names):
        raise RunError(f"--layer {layer} was not found: the model has {len(names)} implicit layers, counted from 0")
    tokens = torch.tensor([list(content)])
    labels = [chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else f"\\x{byte:02x}" for byte in content]
    return inspect(loaded, tokens, tokens=labels, layers=None if layer is None else [names[layer]])


def _content(text: str | None) -> bytes:
    """The bytes of a text, or of the file that it names."""
    if text is None:
        raise RunError("give --text TEXT or --text FILE with --model")
    if not os.path.isfile(text):
        return text.encode("utf-8", "surrogateescape")
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise unreadable("--text", Path(text), error) from None
