"""The source of Python's standard library, byte by byte."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from implicit_attention.errors import check_positive
from implicit_attention.tasks.judging import asked_logits, cross_entropy, held_out_stream
from implicit_attention.tasks.task import Batch
from implicit_attention.tasks.text import held_out_files, standard_library_files, windows

_BYTES = 256
_NATS = math.log(2)  # of a bit


@dataclass(frozen=True)
class ByteText:
    """Predict the next byte of the source of the running Python's standard library.

    Windows are at random places. Each has `length` bytes to read, and the byte after each to predict. A tenth of the
    files is held out, chosen by a hash of their names; `implicit-attention train` holds out the same files. Compare
    figures only within one version of Python, since its library is the text. Its files repeat each other: about one in
    eight strings of 64 bytes of the held-out files stands in the others, too.

    The score of repeated bigrams measures recall: there, the byte before and the byte to predict came next to each
    other earlier in the window.

    Attributes:
        length: Bytes in a window, N.

    Reference:
        Bigrams that come back, as the measure of recall in real text: Arora et al. 2023, "Zoology", arXiv 2312.04927,
        there of tokens.
    """

    length: int = 128

    is_causal: ClassVar[bool] = True
    inputs: ClassVar[int] = _BYTES
    outputs: ClassVar[int] = _BYTES
    score: ClassVar[str] = "-bits_per_byte"

    def __post_init__(self) -> None:
        """Refuse an invalid length."""
        check_positive("length", self.length, integer=True)

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw windows of the training text.

        Args:
            size: Number of windows, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Bytes, and the byte after each, both `[B, length]`, int64.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive, or a window is longer than the text.
            FileNotFoundError: If the interpreter has no source of its library.
        """
        check_positive("size", size, integer=True)
        return self._cut(library(held_out=False), size, generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return windows of the held-out text.

        Args:
            size: Number of windows.
            seed: Decides which ones.

        Returns:
            `{"held_out": batch}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, `seed` negative, or a window longer than the text.
            FileNotFoundError: If the interpreter has no source of its library.
        """
        check_positive("size", size, integer=True)
        return {"held_out": self._cut(library(held_out=True), size, held_out_stream(seed, "bytes"))}

    def _cut(self, text: Tensor, size: int, generator: Generator) -> Batch:
        window = windows(text, size, self.length + 1, generator).long()
        return Batch(window[:, :-1], window[:, 1:])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over all positions, in nats.

        Args:
            logits: `[B, length, 256]`.
            batch: The batch they answer.
        """
        return cross_entropy(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return bits per byte, that is, the mean cross-entropy to the base of 2.

        Args:
            logits: `[B, length, 256]`.
            batch: The batch they answer.

        Returns:
            "bits_per_byte" over all positions; "repeat_bits_per_byte" and "new_bits_per_byte" over those whose bigram
            has and has not come before in the window (NaN if there are none); "repeat_share", the share of the
            former; "-bits_per_byte", larger for better models.
        """
        chosen = asked_logits(logits, torch.ones_like(batch.targets, dtype=torch.bool))
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        bits = F.cross_entropy(chosen, batch.targets.flatten(), reduction="none") / _NATS
        repeats = repeated_bigrams(batch).flatten()
        overall = float(bits.mean())
        return {
            "-bits_per_byte": -overall,
            "bits_per_byte": overall,
            "repeat_bits_per_byte": float(bits[repeats].mean()),
            "new_bits_per_byte": float(bits[~repeats].mean()),
            "repeat_share": float(repeats.float().mean()),
        }


def repeated_bigrams(batch: Batch) -> Tensor:
    """Return where the bigram of the byte read and the byte to predict came earlier in the window.

    Args:
        batch: Windows of bytes.

    Returns:
        `[B, N]`, bool.
    """
    bigrams, order = (batch.inputs * _BYTES + batch.targets).sort(stable=True)  # equal ones stay in their order
    repeats = F.pad(bigrams[:, 1:] == bigrams[:, :-1], (1, 0))
    return torch.empty_like(repeats).scatter_(1, order, repeats)


@functools.cache
def library(*, held_out: bool) -> Tensor:
    """Return one part of the source of the standard library.

    Args:
        held_out: Whether the files that are held out, or all others.

    Returns:
        `[n]`, uint8, file after file in the order of their paths.

    Raises:
        FileNotFoundError: If the interpreter has no source of its library.
    """
    root, files = standard_library_files()
    kept = held_out_files(root, files)
    text = bytearray().join(path.read_bytes() for path in files if (path in kept) == held_out)
    return torch.frombuffer(text, dtype=torch.uint8)
