"""What can go wrong for reasons outside the program, in one line that says what to do."""

from pathlib import Path


class RunError(Exception):
    """A run cannot start or go on, for a reason that its user can do something about. The message is one line."""


def unreadable(what: str, path: Path, error: OSError) -> RunError:
    """Return the fault of a file or directory that cannot be read.

    Args:
        what: What it was read for, such as "--data".
        path: The file.
        error: What the system said.

    Returns:
        The fault, to be raised.
    """
    return RunError(f"cannot read {what} {path}: {reason(error)}")


def unwritable(what: str, path: Path, error: OSError) -> RunError:
    """Return the fault of a file or directory that cannot be written.

    Args:
        what: What it was written for, such as "--out".
        path: The file.
        error: What the system said.

    Returns:
        The fault, to be raised.
    """
    return RunError(f"cannot write to {what} {path}: {reason(error)}")


def reason(error: BaseException) -> str:
    """Return the first line of what an error says, without the file's name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]
