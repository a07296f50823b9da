"""A text that every machine with Python has: the source of the standard library, as bytes."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from implicit_attention.errors import bad_value, check_positive

HELD_OUT = 10  # one file of this many is held out
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def standard_library(limit: int | None = None) -> Tensor:
    """Return the source of the running interpreter's standard library, one file after the other.

    Files come in the order of their paths, tests and installed packages left out: one Python version gives one
    text.

    Args:
        limit: Bytes to read at most; everything (some ten million) if None.

    Returns:
        `[n]`, uint8.

    Raises:
        TypeError: If `limit` is no integer.
        ValueError: If it is not positive.
        FileNotFoundError: If the interpreter has no source of its library.
    """
    if limit is not None:
        check_positive("limit", limit, integer=True)
    text = bytearray()
    for path in standard_library_files()[1]:
        text += path.read_bytes()
        if limit is not None and len(text) >= limit:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:limit].clone()


def standard_library_files() -> tuple[Path, list[Path]]:
    """Return where the running interpreter's standard library is, and its files in the order of their paths.

    Tests, installed packages and empty files are left out.

    Returns:
        The directory, and the files in and below it.

    Raises:
        FileNotFoundError: If the interpreter has no source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix())
    files = [p for p in found if not _LEFT_OUT.intersection(p.relative_to(root).parts) and p.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no source of the standard library in {root}: this Python was installed without it")
    return root, files


def name_hash(root: Path, path: Path) -> bytes:
    """Return the SHA-256 hash of a file's name relative to `root`."""
    return hashlib.sha256(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")).digest()


def held_out_files(root: Path, files: Iterable[Path]) -> set[Path]:
    """Return the files to hold out: a tenth, chosen by a hash of their names, so that adding files changes nothing.

    Args:
        root: Directory that their names are taken from.
        files: Files in it or below it, at least one.

    Returns:
        At least one file, and not all unless there is only one.
    """
    hashes = {path: name_hash(root, path) for path in files}
    held_out = {path for path, digest in hashes.items() if int.from_bytes(digest, "big") % HELD_OUT == 0}
    if not held_out or len(held_out) == len(hashes):
        held_out = {min(hashes, key=lambda path: hashes[path])}
    return held_out


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut windows at random places.

    Args:
        text: `[n]`, uint8.
        count: Number of windows, B.
        length: Bytes in each, N, at most n.
        generator: Source of the randomness, on the CPU.

    Returns:
        `[B, N]`, uint8.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If it is not positive, or the text is shorter than a window.
    """
    check_positive("count", count, integer=True)
    check_positive("length", length, integer=True)
    if text.dim() != 1 or len(text) < length:
        raise bad_value("text", f"of one dimension and at least length={length} bytes", text)
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]
