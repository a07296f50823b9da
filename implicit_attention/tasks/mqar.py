"""Multi-query associative recall as Zoology defines it: pairs, then their keys again among random tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from implicit_attention.errors import bad_type, bad_value, check_positive
from implicit_attention.tasks.judging import Answers, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class MQAR(Answers):
    """Predict the value that came after a key, at each position where a key comes back.

    A sequence begins with `k1 v1 k2 v2 ...`. Keys are distinct tokens of 1 to V/2 - 1, values are distinct tokens of
    V/2 to V - 1. The other `length - 2 pairs` positions are slots of two tokens. Each key comes back once, as the first
    token of a slot. Slots are drawn for the keys in order, without replacement. Slot g (from 0) has the weight
    `(g + 1)**(power_a - 1)`, so most keys come back early. The other positions hold random tokens of the vocabulary, or
    token 0. The target at a returning key is its value.

    The published sizes (length, pairs) are (64, 4), (128, 8) and (256, 16), with a vocabulary of 8192, 100,000
    training sequences and 3,000 test sequences. Two things differ here. Sequences are drawn anew for every batch. The
    vocabulary is 512 by default, since 8192 logits would take most of a small model's time on a CPU. The paper's runs
    fill with token 0 (`random_fill=False`); its generator fills at random by default.

    Published figures are for models of two layers. The task itself has no convolution that would shift a token.

    Attributes:
        length: Tokens in a sequence, N, even.
        pairs: Pairs in a sequence; `4 pairs <= length`.
        vocabulary: Different tokens V, even and more than `length`.
        power_a: Exponent of the law of the gaps; 1 is uniform.
        random_fill: Whether positions outside pairs and queries hold random tokens; else they hold token 0.

    Reference:
        Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language models", arXiv 2312.04927,
        figure 2; `zoology/data/multiquery_ar.py` of github.com/HazyResearch/zoology.
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 512
    power_a: float = 0.01
    random_fill: bool = True

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        for name in ("length", "pairs", "vocabulary"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("power_a", self.power_a)
        if not isinstance(self.random_fill, bool):
            raise bad_type("random_fill", "True or False", self.random_fill)
        if self.length % 2 or self.length < 4 * self.pairs:
            raise bad_value("length", f"even and at least 4 pairs = {4 * self.pairs}", self.length)
        if self.vocabulary % 2 or self.vocabulary <= self.length:
            raise bad_value("vocabulary", f"even and more than length={self.length}", self.vocabulary)

    @property
    def inputs(self) -> int:
        """Different tokens."""
        return self.vocabulary

    @property
    def outputs(self) -> int:
        """Different classes: any token, as published, although only values are targets."""
        return self.vocabulary

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw sequences.

        Args:
            size: Number of sequences, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, length]`, int64; `pairs` targets of a sequence are asked for.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
        """
        check_positive("size", size, integer=True)
        half = self.vocabulary // 2
        keys = 1 + _distinct(size, self.pairs, half - 1, generator)
        values = half + _distinct(size, self.pairs, half, generator)
        at = 2 * self.pairs + 2 * self._slots(size, generator)  # [B, pairs]: where each key comes back
        tokens = self._fill(size, generator)
        tokens[:, : 2 * self.pairs] = torch.stack([keys, values], -1).flatten(1)
        targets = torch.full_like(tokens, IGNORED)
        return Batch(tokens.scatter_(1, at, keys), targets.scatter_(1, at, values))

    def _slots(self, size: int, generator: Generator) -> Tensor:
        """Draw the slot of each pair's query, `[B, pairs]`, without replacement."""
        places = torch.arange(1, self.length // 2 - self.pairs + 1, dtype=torch.float64)
        weights = places ** (self.power_a - 1)
        return torch.multinomial(weights.expand(size, -1), self.pairs, generator=generator)

    def _fill(self, size: int, generator: Generator) -> Tensor:
        if self.random_fill:
            return torch.randint(self.vocabulary, (size, self.length), generator=generator)
        return torch.zeros(size, self.length, dtype=torch.int64)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out sequences, of one kind, from a random stream that training never uses.

        Args:
            size: Number of sequences.
            seed: Decides which ones.

        Returns:
            `{"held_out": batch}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
        """
        return {"held_out": self.batch(size, held_out_stream(seed, "mqar"))}


def _distinct(size: int, count: int, choices: int, generator: Generator) -> Tensor:
    """Draw numbers below `choices`, `[size, count]`: distinct within a row, in random order."""
    return torch.rand(size, choices, generator=generator).topk(count).indices
