"""Directories that appear whole or not at all, also when the power fails or the disk is full."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished-"


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name beside it; give it its own once every byte of it is on the disk.

    Args:
        path: The directory, which must not exist yet.

    Yields:
        The directory to write into. If the block raises, it is removed, and nothing is left of it.

    Raises:
        OSError: If it cannot be written.
    """
    with _unfinished(path) as temporary:
        yield temporary
        _flush_all(temporary)
        temporary.rename(path)
    _flush(path.parent)


@contextmanager
def whole_files(directory: Path) -> Iterator[Path]:
    """Write files that each replace their namesake in a directory in one step, once all are on the disk.

    Args:
        directory: Where they go.

    Yields:
        The directory to write them into. If the block raises, it is removed, and no file was replaced.

    Raises:
        OSError: If they cannot be written.
    """
    with _unfinished(directory / "files") as temporary:
        yield temporary
        _flush_all(temporary)
        for file in sorted(temporary.iterdir()):
            file.replace(directory / file.name)
        temporary.rmdir()
    _flush(directory)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_UNFINISHED}{path.name}-"))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Remove a directory so that no one ever sees a part of it.

    Args:
        path: The directory.

    Raises:
        OSError: If it cannot be removed.
    """
    doomed = path.parent / f"{_UNFINISHED}old-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(directory: Path) -> None:
    """Remove what runs that were killed have left half-written in a directory.

    Args:
        directory: Where the functions of this file were at work.
    """
    for path in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush_all(directory: Path) -> None:
    for file in directory.iterdir():
        _flush(file)
    _flush(directory)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of files in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
