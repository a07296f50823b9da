"""Directories that appear whole or not at all, even if the power fails or the disk is full."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished-"


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name beside it, and rename it when every byte is on the disk.

    Args:
        path: The directory, which must not exist yet.

    Yields:
        The directory to write into. If the block raises, the directory is removed.

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
    """Write files that replace files of the same names in a directory, one by one, when all are on the disk.

    Directories may be written too: their files join those that a directory of the same name has.

    Args:
        directory: The directory.

    Yields:
        A temporary directory to write the files into. If the block raises, it is removed and no file is replaced.

    Raises:
        OSError: If they cannot be written.
    """
    with _unfinished(directory / "files") as temporary:
        yield temporary
        _flush_all(temporary)
        _move_all(temporary, directory)


def _move_all(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_dir():
            (target / path.name).mkdir(exist_ok=True)
            _move_all(path, target / path.name)
        else:
            path.replace(target / path.name)
    source.rmdir()
    _flush(target)


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
    """Remove a directory so that nobody sees a part of it: it is renamed first.

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
    """Remove what killed runs have left half-written in a directory.

    Args:
        directory: A directory that the functions of this file wrote to.
    """
    for path in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush_all(directory: Path) -> None:
    for path in directory.iterdir():
        (_flush_all if path.is_dir() else _flush)(path)
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
