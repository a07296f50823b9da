"""`implicit-attention eval`: runs the studies of a checkout. They are not part of the installed package."""

import sys
from importlib import import_module
from pathlib import Path

import typer

from implicit_attention.cli.faults import one_line
from implicit_attention.training.faults import RunError

ROOT = Path(__file__).parents[2]


def evaluate(context: typer.Context) -> None:
    """Train small models that differ only in their attention, and compare what they learn.

    This needs a checkout of the project. There, `python -m studies` is the same command.
    """
    with one_line("eval", extra="all"):
        _find_studies()
        import_module("studies.command").app(context.args, prog_name="implicit-attention eval")


def _find_studies() -> None:
    if not (ROOT / "studies" / "command.py").is_file():
        raise RunError(
            "the studies are only in the source: clone the project, run `pip install -e '.[all]'` in the clone, "
            "then `implicit-attention eval`"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
