"""Associative recall: pairs of a key and its value, then the keys again. The targets are their values."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.errors import bad_value, check_positive


class RecallBatch(NamedTuple):
    """Sequences and the targets of their last `pairs` positions.

    Attributes:
        tokens: `[B, 3 pairs]`, int64: `k1 v1 k2 v2 ...`, then the keys again in random order.
        targets: `[B, pairs]`, int64: the value token that belongs to each queried key.
    """

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Recall:
    """The task: look up a value that comes one token after its key.

    One layer of plain ordinary attention does not learn it: the value, which is the token to read, does not know which
    key it follows. Two layers do, or one with a convolution on its keys.

    Attributes:
        pairs: Pairs in a sequence; its keys are distinct, its values need not be.
        keys: Different keys; tokens 0 to keys - 1.
        values: Different values; tokens keys to keys + values - 1.

    Reference:
        Multi-query associative recall, Arora et al., "Zoology", arXiv 2312.04927.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        for name in ("pairs", "keys", "values"):
            check_positive(name, getattr(self, name), integer=True)
        if self.pairs > self.keys:
            raise bad_value("pairs", f"at most keys={self.keys}", self.pairs, "A sequence's keys are distinct.")

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.keys + self.values

    @property
    def length(self) -> int:
        """Tokens in a sequence, N."""
        return 3 * self.pairs

    def batch(self, size: int, generator: torch.Generator) -> RecallBatch:
        """Draw a batch.

        Args:
            size: Number of sequences, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Sequences `[B, 3 pairs]` and targets `[B, pairs]`.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
        """
        check_positive("size", size, integer=True)
        keys = torch.rand(size, self.keys, generator=generator).argsort(-1)[:, : self.pairs]
        values = torch.randint(self.keys, self.vocabulary, (size, self.pairs), generator=generator)
        order = torch.rand(size, self.pairs, generator=generator).argsort(-1)
        pairs = torch.stack([keys, values], -1).flatten(1)  # [B, 2 pairs]
        return RecallBatch(torch.cat([pairs, keys.gather(1, order)], 1), values.gather(1, order))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the answers.

        Args:
            logits: `[B, 3 pairs, vocabulary]`, of which the last `pairs` positions count.
            targets: `[B, pairs]`.
        """
        return F.cross_entropy(logits[:, -self.pairs :].flatten(0, 1), targets.flatten())

    def accuracy(self, logits: Tensor, targets: Tensor) -> float:
        """Return the share of right answers.

        Args:
            logits: `[B, 3 pairs, vocabulary]`, of which the last `pairs` positions count.
            targets: `[B, pairs]`.
        """
        return float((logits[:, -self.pairs :].argmax(-1) == targets).float().mean())
