"""`implicit-attention generate`: text from a trained model, shown as it is made."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from implicit_attention.cli.faults import one_line


def generate(
    model: Annotated[
        Path,
        typer.Option(help="Directory of a run of [bold]implicit-attention train[/bold], or one of its checkpoints."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="a line break")] = "\n",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Bytes to write.", show_default="as many as fit the model's length")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 0. Below 1, likely bytes become more likely.", show_default="1.0")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose only among the k most likely bytes.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1, help="Choose among the fewest bytes whose probabilities sum to this."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random choices.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely byte.")] = False,
    device: Annotated[str, typer.Option(help="Device to compute on.", metavar="auto|cpu|cuda")] = "auto",
) -> None:
    """Continue a text with a trained model.

    Prints the prompt and what follows it, as it is made. In a terminal, control bytes are shown as symbols. In a file
    or a pipe, all bytes are written unchanged.
    """
    with one_line("generate"):
        from implicit_attention.training import generation

        choice = generation.Choice(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, greedy=greedy)
        loaded = generation.load(model, device=device)
        write = generation.terminal_writer(sys.stdout) if sys.stdout.isatty() else generation.byte_writer(sys.stdout)
        generation.write_on(loaded, prompt.encode("utf-8", "surrogateescape"), max_new_tokens, choice, write)
