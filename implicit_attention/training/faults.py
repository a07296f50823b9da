"""Faults that a user can mend, each as one line that says what to do."""

from pathlib import Path


class RunError(Exception):
    """A run cannot start or continue, for a reason that its user can mend. The message is one line."""


class SettingError(RunError):
    """A setting cannot be.

    Attributes:
        setting: Its name in a YAML file.
        sentence: What is wrong with it.
    """

    def __init__(self, setting: str, sentence: str) -> None:
        """Make it.

        Args:
            setting: Its name in a YAML file.
            sentence: What is wrong with it.
        """
        super().__init__(f"{setting}: {sentence}")
        self.setting, self.sentence = setting, sentence


def unreadable(what: str, path: Path, error: OSError) -> RunError:
    """Return the fault of a file or directory that cannot be read.

    Args:
        what: The option that names it, such as "--data".
        path: The file.
        error: The error of the system.

    Returns:
        The error to raise.
    """
    return RunError(f"cannot read {what} {path}: {reason(error)}")


def unwritable(what: str, path: Path, error: OSError) -> RunError:
    """Return the fault of a file or directory that cannot be written.

    Args:
        what: The option that names it, such as "--out".
        path: The file.
        error: The error of the system.

    Returns:
        The error to raise.
    """
    return RunError(f"cannot write to {what} {path}: {reason(error)}")


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without the file's name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]
