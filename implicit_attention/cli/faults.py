"""How a command fails: one line on standard error, and status 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from implicit_attention.training.faults import RunError


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """Turn faults and missing packages into one line on standard error and status 2.

    Args:
        command: The command's name.

    Raises:
        typer.Exit: Instead of these. Of several processes, only the first prints.
    """
    try:
        yield
    except RunError as fault:
        _end(command, str(fault))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "implicit_attention":
            raise
        _end(command, f"{error.name} is missing: pip install 'implicit-attention[train]'")


def first_process() -> bool:
    """Return whether this process is the first of those that run together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _end(command: str, message: str) -> None:
    if first_process():
        print(f"implicit-attention {command}: {message}", file=sys.stderr)
    raise typer.Exit(2) from None
