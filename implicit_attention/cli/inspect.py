"""`implicit-attention inspect`: a report of a model's equilibria, as one file for a browser."""

import os
import re
import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer

from implicit_attention.cli import output
from implicit_attention.cli.faults import one_line
from implicit_attention.errors import counted
from implicit_attention.inspection.inspecting import implicit_layers, inspect
from implicit_attention.inspection.report import Report
from implicit_attention.seed import ImplicitQueryAttentionLinearV
from implicit_attention.training.faults import RunError, reason, unreadable, unwritable


def inspect_command(
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a run of [bold]implicit-attention train[/bold], or one of its checkpoints."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="A text, or a file that holds one. What looks like a path must be a file: to inspect it as a text, "
            "begin it with a blank, which is a part of the text then.",
            metavar="TEXT|FILE",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write, in HTML.", metavar="FILE.html")] = Path("report.html"),
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
    if out.suffix.lower() not in ("", ".html", ".htm"):
        raise RunError(f"--out {out}: the page is HTML: use --out {out.with_suffix('.html')}")
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

    if text is None:
        raise RunError("give --text TEXT or --text FILE with --model")
    content = _content(text)
    loaded = generation.load(directory, device="cpu")
    _check_length(text, content, loaded.config.max_position_embeddings)
    names = implicit_layers(loaded)
    if not names:
        raise RunError(f"--model {directory} has only ordinary layers: there is no equilibrium to inspect")
    if layer is not None and layer >= len(names):
        raise RunError(
            f"--layer {layer} was not found: the model has {counted(len(names), 'implicit layer')}, counted from 0"
        )
    tokens = torch.tensor([list(content)])
    labels = [chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else f"\\x{byte:02x}" for byte in content]
    return inspect(loaded, tokens, tokens=labels, layers=None if layer is None else [names[layer]])


def _content(text: str) -> bytes:
    """The bytes of a text, or of the file that it names."""
    if not os.path.isfile(text):
        if _looks_like_a_path(text):
            raise RunError(f"--text {text} is no file: to inspect it as a text, use --text {shlex.quote(' ' + text)}")
        return text.encode("utf-8", "surrogateescape")
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise unreadable("--text", Path(text), error) from None


def _looks_like_a_path(text: str) -> bool:
    """Whether a text has no blank, and a path's separator or the suffix of a file."""
    return not re.search(r"\s", text) and (os.path.basename(text) != text or bool(re.search(r"\w\.\w+$", text)))


def _check_length(text: str, content: bytes, longest: int) -> None:
    if 0 < len(content) <= longest:
        return
    remedy = ""
    if content and os.path.isfile(text):
        remedy = f"; take its first: head -c {longest} {shlex.quote(text)} > part.txt, then --text part.txt"
    raise RunError(f"--text has {counted(len(content), 'byte')}: the model's sequences have 1 to {longest}{remedy}")
