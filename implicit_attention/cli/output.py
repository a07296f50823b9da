"""The files of a command: the directory is checked before any work, and files are written whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prepare(directory: Path, names: Iterable[str]) -> None:
    """Create a directory with its parents, and check that files can be written there.

    Args:
        directory: The directory.
        names: Files that will be written there.

    Raises:
        NotADirectoryError: If the path exists and is not a directory.
        OSError: If the directory cannot be created, or a file in it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "it exists and is not a directory") from None
    for name in names:
        if (directory / name).is_dir():
            raise OSError(errno.EISDIR, f"{name} is a directory")
    with tempfile.TemporaryFile(dir=directory):
        pass


def write(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it, so that nobody reads half a file.

    Args:
        path: The file.
        content: Its content; text is written as UTF-8.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, as `write` does.

    Args:
        path: The file.
        figure: The figure.
    """
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write(path, buffer.getvalue())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
