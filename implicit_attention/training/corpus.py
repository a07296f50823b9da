"""Training text and held-out text: any files, read as bytes. Nothing is decoded or downloaded."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from implicit_attention.tasks.text import HELD_OUT, held_out_files, name_hash, standard_library_files
from implicit_attention.training.faults import RunError, unreadable

_SAMPLES, _SAMPLE = 64, 1 << 16  # a large file's fingerprint covers this many parts of this many bytes


class FilePart:
    """Some bytes of a file, read where they are looked at: a file that is cut short meanwhile is noticed.

    (Reading what is mapped into memory would end the process.)
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        """Make it.

        Args:
            path: Of the file.
            start: The first byte.
            stop: The byte after the last.
        """
        self.path, self._start, self._stop = path, start, stop

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self._stop - self._start

    def __getitem__(self, part: slice) -> Tensor:
        """Return a part, uint8.

        Raises:
            RunError: If the file cannot be read, or has become shorter.
        """
        start, stop, _ = part.indices(len(self))
        content = bytearray(self.read(start, stop))
        return torch.frombuffer(content, dtype=torch.uint8) if content else _NOTHING

    def read(self, start: int, stop: int) -> bytes:
        """Return some of the bytes.

        Args:
            start: The first, counted from the first of the part.
            stop: The one after the last.

        Raises:
            RunError: If the file cannot be read, or has become shorter.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + start)
                content = file.read(stop - start)
        except OSError as error:
            raise unreadable("--data", self.path, error) from None
        if len(content) < stop - start:
            raise RunError(
                f"--data {self.path} has been cut short since the run began: it had at least {self._stop} bytes. "
                "Restore it, and go on with --resume"
            )
        return content


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes:
        name: Where it comes from, to print.
        training: `[n]`, uint8. A single file is read where it is used.
        held_out: `[m]`, uint8, likewise.
        fingerprint: Differs when the text does.
        sizes: Bytes of each document, of the training text and of the held-out text.
    """

    name: str
    training: "Tensor | FilePart"
    held_out: "Tensor | FilePart"
    fingerprint: str
    sizes: tuple[list[int], list[int]]


def read(data: str, *, without: Path | None = None) -> Corpus:
    """Read the text that `--data` names.

    Of several files, a tenth is held out as whole files. A hash of each file's name decides, so the split does not
    change when files are added. Of a single file, the last tenth is held out; the file is not read at once.

    Args:
        data: A file; a directory, in which hidden files and the directories of runs are left out; or "default".
        without: The directory of a run that may have no checkpoint yet. It is left out, too.

    Returns:
        The text.

    Raises:
        RunError: If there is no text, or it cannot be read.
    """
    if data == "default":
        try:
            root, files = standard_library_files()
        except FileNotFoundError as error:
            raise RunError(f"{error}. Name a text of your own with --data.") from None
        return _from_files("the source of Python's standard library", root, files)
    path = Path(data)
    try:
        path.stat()
    except OSError as error:
        raise unreadable("--data", path, error) from None
    if path.is_dir():
        files = _files_in(path, without)
        return _from_files(data, path, files) if len(files) > 1 else _from_file(data, files[0])
    if not path.is_file():
        raise RunError(f"cannot read --data {path}: it is neither a file nor a directory")
    return _from_file(data, path)


def _files_in(directory: Path, without: Path | None) -> list[Path]:
    """The files in a directory and below it in the order of their names, without hidden ones and those of runs."""

    def refuse(error: OSError) -> None:
        raise unreadable("--data", Path(error.filename), error)

    found: list[Path] = []
    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_run(Path(folder, name), without)]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += (path for path in paths if path.is_file() or path.is_symlink())
    if not found:
        raise RunError(f"--data {directory} has no file to learn from (hidden files and runs are left out)")
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def _is_run(directory: Path, own: Path | None) -> bool:
    """Whether a run keeps its checkpoints in a directory, or is going to."""
    return (own is not None and directory.resolve() == own.resolve()) or any(directory.glob("checkpoint-*/run.json"))


def _from_files(name: str, root: Path, files: list[Path]) -> Corpus:
    held_out = held_out_files(root, files)
    parts, sizes = (bytearray(), bytearray()), ([], [])  # type: tuple[bytearray, bytearray], tuple[list[int], list[int]]
    fingerprint = hashlib.sha256()
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable("--data", path, error) from None
        parts[path in held_out].extend(content)
        sizes[path in held_out].append(len(content))
        fingerprint.update(name_hash(root, path) + hashlib.sha256(content).digest())
    training, kept = (torch.frombuffer(part, dtype=torch.uint8) if part else _NOTHING for part in parts)
    return Corpus(name, training, kept, fingerprint.hexdigest(), sizes)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _from_file(name: str, path: Path) -> Corpus:
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise unreadable("--data", path, error) from None
    if not size:
        raise RunError(f"--data {path} is empty: there is nothing to learn from")
    text = FilePart(path, 0, size)
    fingerprint = hashlib.sha256(str(size).encode())
    for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
        fingerprint.update(text.read(start, min(start + _SAMPLE, size)))
    border = size - max(1, size // HELD_OUT)
    parts = FilePart(path, 0, border), FilePart(path, border, size)
    return Corpus(name, *parts, fingerprint.hexdigest(), ([border], [size - border]))
