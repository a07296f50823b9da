"""How a command fails: one line on standard error, and status 2."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from implicit_attention.training.faults import RunError


@contextmanager
def one_line(command: str, *, extra: str = "train") -> Iterator[None]:
    """Turn faults and missing packages into one line on standard error and status 2.

    Args:
        command: The command's name.
        extra: The extra that has the command's packages.

    Raises:
        typer.Exit: Instead of these. Of several processes, only the first prints.
    """
    try:
        yield
    except RunError as fault:
        _end(command, str(fault))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("implicit_attention", "studies"):
            raise
        _end(command, f"{error.name} is missing: pip install 'implicit-attention[{extra}]'")


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the command by an exception, so that nothing half-written is left.

    Raises:
        SystemExit: With status 143, in the middle of the block.
    """

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only it may have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def first_process() -> bool:
    """Return whether this process is the first of those that run together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _end(command: str, message: str) -> None:
    if first_process():
        print(f"implicit-attention {command}: {message}", file=sys.stderr)
    raise typer.Exit(2) from None
