"""The source of Python's standard library with some bytes hidden, predicted from both sides."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.byte_text import library
from implicit_attention.tasks.judging import cross_entropy, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch
from implicit_attention.tasks.text import windows

_HIDDEN = 256  # the token of a hidden byte


@dataclass(frozen=True)
class MaskedBytes:
    """Predict hidden bytes. Every position sees all others.

    The text, its windows and its held-out files are those of `ByteText`. In each window `masked` random bytes are
    replaced by a token of their own, 256.

    Attributes:
        length: Bytes in a window, N.
        masked: Hidden bytes of a window, 1 to `length`.

    Reference:
        Devlin et al. 2019, "BERT", arXiv 1810.04805, which hides 15 % of the tokens.
    """

    length: int = 96
    masked: int = 14

    is_causal: ClassVar[bool] = False
    inputs: ClassVar[int] = 257
    outputs: ClassVar[int] = 256
    score: ClassVar[str] = "-bits_per_byte"

    def __post_init__(self) -> None:
        """Refuse more hidden bytes than a window has."""
        check_positive("length", self.length, integer=True)
        check_positive("masked", self.masked, integer=True)
        if self.masked > self.length:
            raise bad_value("masked", f"at most length={self.length}", self.masked)

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw windows of the training text.

        Args:
            size: Number of windows, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, length]`, int64; `masked` targets of a window are asked for.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive, or a window is longer than the text.
            FileNotFoundError: If the interpreter has no source of its library.
        """
        check_positive("size", size, integer=True)
        return self._hide(library(held_out=False), size, generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return windows of the held-out text.

        Args:
            size: Number of windows.
            seed: Decides which ones, and which of their bytes are hidden.

        Returns:
            `{"held_out": batch}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, `seed` negative, or a window longer than the text.
            FileNotFoundError: If the interpreter has no source of its library.
        """
        check_positive("size", size, integer=True)
        return {"held_out": self._hide(library(held_out=True), size, held_out_stream(seed, "masked bytes"))}

    def _hide(self, text: Tensor, size: int, generator: Generator) -> Batch:
        window = windows(text, size, self.length, generator).long()
        chosen = torch.rand(window.shape, generator=generator).topk(self.masked).indices
        hidden = torch.zeros_like(window, dtype=torch.bool).scatter_(1, chosen, True)
        return Batch(window.masked_fill(hidden, _HIDDEN), window.masked_fill(~hidden, IGNORED))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the hidden bytes, in nats.

        Args:
            logits: `[B, length, 256]`.
            batch: The batch they answer.
        """
        return cross_entropy(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return bits per hidden byte, as "bits_per_byte"; "-bits_per_byte" is larger for better models.

        Args:
            logits: `[B, length, 256]`.
            batch: The batch they answer.
        """
        bits = float(self.loss(logits, batch)) / log(2)
        return {"-bits_per_byte": -bits, "bits_per_byte": bits}
