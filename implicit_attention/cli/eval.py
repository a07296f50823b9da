"""`implicit-attention eval`: the studies of a checkout, which are no part of the installed package."""

import sys
from importlib import import_module
from pathlib import Path

import typer

from implicit_attention.cli.faults import one_line
from implicit_attention.training.faults import RunError

ROOT = Path(__file__).parents[2]


def evaluate(context: typer.Context) -> None:
    """Train small models that differ in their attention alone, and compare what they learn.

    Needs a checkout of the project; there `python -m studies` is the same command.
    """
    with one_line("eval"):
        _find_studies()
    import_module("studies.command").app(context.args, prog_name="implicit-attention eval")


def _find_studies() -> None:
    if not (ROOT / "studies" / "command.py").is_file():
        raise RunError(
            "the studies come with the source alone: clone the project, run `pip install -e '.[all]'` there, "
            "then `implicit-attention eval`"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
