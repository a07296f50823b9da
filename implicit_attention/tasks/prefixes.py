"""The base of tasks whose target at every position depends on all tokens so far, at any length."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from implicit_attention.errors import bad_type, check_positive
from implicit_attention.tasks.judging import accuracy, cross_entropy, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class PrefixTask(abc.ABC):
    """Base: short training sequences, longer held-out ones, and a target at every position for its prefix.

    Sequences to learn from all have `train_length` tokens: a causal model is asked about each of their prefixes,
    which is to train on every length up to it.

    Attributes:
        train_length: Tokens in a training sequence.
        judged: Lengths of held-out sequences.
    """

    train_length: int
    judged: tuple[int, ...]

    is_causal: ClassVar[bool] = True
    score: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Refuse invalid lengths."""
        check_positive("train_length", self.train_length, integer=True)
        if not isinstance(self.judged, tuple) or not self.judged:
            raise bad_type("judged", "a tuple of lengths, at least one", self.judged)
        for length in self.judged:
            check_positive("judged", length, integer=True)

    @property
    def length(self) -> int:
        """Longest sequence, training or held out."""
        return max(self.train_length, *self.judged)

    @abc.abstractmethod
    def draw(self, size: int, length: int, generator: Generator) -> Batch:
        """Draw sequences of a length.

        Args:
            size: Number of sequences, B.
            length: Tokens in each, N.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, N]`, int64; every position is asked about.
        """

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw training sequences.

        Args:
            size: Number of sequences, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, train_length]`, int64.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
        """
        check_positive("size", size, integer=True)
        return self.draw(size, self.train_length, generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out sequences of every length, from random streams that training never uses.

        Args:
            size: Number of sequences of each length.
            seed: Decides which ones.

        Returns:
            `{"length=40": batch, ...}`, in the order of `judged`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
        """
        check_positive("size", size, integer=True)
        streams = {n: held_out_stream(seed, f"{type(self).__name__} {n}") for n in self.judged}
        return {f"length={n}": self.draw(size, n, stream) for n, stream in streams.items()}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over all positions, in nats.

        Args:
            logits: `[B, N, outputs]`.
            batch: The batch they answer.
        """
        return cross_entropy(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return shares of right answers.

        Args:
            logits: `[B, N, outputs]`.
            batch: The batch they answer.

        Returns:
            "accuracy" over all positions; "last_quarter_accuracy" over the last quarter of them, rounded up, where
            the longest prefixes are; "whole_accuracy", the share of sequences answered right at every position.
        """
        everywhere = accuracy(logits, batch)
        late = batch.targets.clone()
        late[:, : late.shape[1] * 3 // 4] = IGNORED
        whole = (logits.argmax(-1) == batch.targets).all(-1)
        return {
            "accuracy": everywhere,
            "last_quarter_accuracy": accuracy(logits, Batch(batch.inputs, late)),
            "whole_accuracy": float(whole.float().mean()),
        }
