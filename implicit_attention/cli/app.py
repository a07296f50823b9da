"""The list of commands."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from implicit_attention import __version__
from implicit_attention.cli.convert import convert
from implicit_attention.cli.demo import demo
from implicit_attention.cli.eval import evaluate
from implicit_attention.cli.generate import generate
from implicit_attention.cli.info import info
from implicit_attention.cli.inspect import inspect_command
from implicit_attention.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "convert": convert,
    "eval": evaluate,
    "inspect": inspect_command,
    "info": info,
}
_PASSED_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
for name, command in COMMANDS.items():
    # A docstring is wrapped for the source. The terminal wraps each paragraph itself.
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    page = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, help=page, **(_PASSED_ON if name == "eval" else {}))(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"implicit-attention {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention whose queries are made from its own output, solved to its equilibrium.

    y = softmax(K (Omega_Q y)^T / sqrt(d)) V with K = W_K x and V = Omega_V x.
    Start with [bold]implicit-attention demo[/bold].
    """
