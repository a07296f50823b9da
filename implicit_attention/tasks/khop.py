"""k-hop induction: look up what followed the last occurrence of a symbol, then repeat that k times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.judging import accuracy, cross_entropy, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class KHop:
    """Predict where k hops lead from every position. One model learns all k; the first token tells k.

    A hop goes from position i to j + 1, where j < i is the last position before i with the same symbol. The target at i
    is the symbol where k hops from i end, or "none" if a hop finds no earlier occurrence. Symbols are random, but two
    neighbours are never equal.

    Tokens are the symbols 0 to symbols - 1, then `symbols + k - 1` for k, which comes first. Classes are the symbols,
    then "none". Every position but the first has a target. As k grows, more targets are "none": about half at k = 8 and
    a length of 48. So there is a second score, over targets that are a symbol.

    The published code has k from 0 to 16 (0 copies) and sequences of 1 + 98 tokens for its 100. A blank class labels
    the first position. The sizes here are lengths of 48 and 100, and k = 1 to 8.

    Attributes:
        length: Tokens in a sequence, N. The first one tells k.
        hops: Largest k; k is uniform in 1 to hops.
        symbols: Size of the alphabet, at least 2.

    Reference:
        Sanford, Hsu and Telgarsky 2024, "Transformers, parallel computation, and logarithmic depth", arXiv
        2402.09268, section 5; `src/tasks.py` of github.com/chsanford/hop-induction-heads.
    """

    length: int = 48
    hops: int = 8
    symbols: int = 4

    is_causal: ClassVar[bool] = True
    score: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        for name in ("length", "hops", "symbols"):
            check_positive(name, getattr(self, name), integer=True)
        if self.length < 2:
            raise bad_value("length", "at least 2", self.length, "The first token of a sequence tells k.")
        if self.symbols < 2:
            raise bad_value("symbols", "at least 2", self.symbols, "No symbol stands twice in a row.")

    @property
    def inputs(self) -> int:
        """Different tokens: the symbols, and one for each k."""
        return self.symbols + self.hops

    @property
    def outputs(self) -> int:
        """Different classes: the symbols, and "none"."""
        return self.symbols + 1

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw training sequences, each with its own k.

        Args:
            size: Number of sequences, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, length]`, int64.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
        """
        check_positive("size", size, integer=True)
        return self._ask(1 + torch.randint(self.hops, (size, 1), generator=generator), generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out sequences for every k, from random streams that training never uses.

        Args:
            size: Number of sequences of each k.
            seed: Decides which ones.

        Returns:
            `{"hops=1": batch, "hops=2": batch, ...}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
        """
        check_positive("size", size, integer=True)
        kinds = {f"hops={k}": k for k in range(1, self.hops + 1)}
        return {
            kind: self._ask(torch.full((size, 1), k), held_out_stream(seed, f"khop {kind}"))
            for kind, k in kinds.items()
        }

    def _ask(self, k: Tensor, generator: Generator) -> Batch:
        """Draw sequences and answer them for given k, `[B, 1]`."""
        symbols = self._symbols(len(k), generator)  # [B, N - 1]
        tokens = torch.cat([self.symbols + k - 1, symbols], 1)
        answers = torch.cat([torch.full_like(k, self.symbols), symbols], 1)  # where no hop leads: "none"
        targets = answers.gather(1, self._destinations(symbols, k))
        targets[:, 0] = IGNORED
        return Batch(tokens, targets)

    def _symbols(self, size: int, generator: Generator) -> Tensor:
        """Draw symbols so that no two neighbours are equal: each adds a step to the one before it, modulo A."""
        first = torch.randint(self.symbols, (size, 1), generator=generator)
        steps = torch.randint(1, self.symbols, (size, self.length - 2), generator=generator)
        return torch.cat([first, steps], 1).cumsum(1) % self.symbols

    def _destinations(self, symbols: Tensor, k: Tensor) -> Tensor:
        """Return the position where k hops end, `[B, N]`, the first token counted; 0 if they lead nowhere."""
        alike, order = symbols.sort(stable=True)  # [B, N - 1]: equal symbols in a row, each after the one before it
        after = torch.where(alike[:, 1:] == alike[:, :-1], order[:, :-1] + 2, 0)  # past it, and past the token of k
        hop = F.pad(torch.empty_like(order).scatter_(1, order, F.pad(after, (1, 0))), (1, 0))  # [B, N], from 0 to 0
        place = torch.arange(self.length).expand(len(k), -1)
        for done in range(int(k.max())):
            place = torch.where(done < k, hop.gather(1, place), place)
        return place

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over all positions but the first, in nats.

        Args:
            logits: `[B, length, symbols + 1]`.
            batch: The batch they answer.
        """
        return cross_entropy(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return the share of right answers for each k in the batch.

        Args:
            logits: `[B, length, symbols + 1]`.
            batch: The batch they answer.

        Returns:
            "accuracy" over all positions but the first, and "found_accuracy" over those whose answer is a symbol
            (NaN if there are none, as in sequences too short for k hops).
        """
        found = torch.where(batch.targets == self.symbols, IGNORED, batch.targets)
        return {
            "accuracy": accuracy(logits, batch),
            "found_accuracy": accuracy(logits, Batch(batch.inputs, found)),
        }
