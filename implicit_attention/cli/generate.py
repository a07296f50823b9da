"""`implicit-attention generate`: text from a trained model, byte by byte as it comes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from implicit_attention.cli.faults import one_line


def generate(
    model: Annotated[
        Path,
        typer.Option(help="Directory of a run of [bold]implicit-attention train[/bold], or of one of its checkpoints."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "\n",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Bytes to write.", show_default="as many as the model's sequences hold")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=1e-6, help="Below 1 likely bytes become likelier.", show_default="1.0")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest bytes alone.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1, help="Choose among the fewest bytes that are together this likely.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the choice.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest byte.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute.", metavar="auto|cpu|cuda")] = "auto",
) -> None:
    """Write on from a text with a trained model.

    The prompt and what follows it appear as they are made. Into a terminal, bytes that would control it are shown as
    symbols; into a file or a pipe, all bytes go as they are.
    """
    with one_line("generate"):
        from implicit_attention.training import generation

        choice = generation.Choice(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, greedy=greedy)
        loaded = generation.load(model, device=device)
        write = generation.terminal_writer(sys.stdout) if sys.stdout.isatty() else generation.byte_writer(sys.stdout)
        generation.write_on(loaded, prompt.encode("utf-8", "surrogateescape"), max_new_tokens, choice, write)
