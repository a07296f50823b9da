"""Recall with fillers between a key and its value, and keys of several tokens: content, not position, binds them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.judging import Answers, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class GappedRecall(Answers):
    """Predict the value that belongs to a key, where fillers stand between the two.

    A sequence is `pairs` times *key, fillers, value*, then all keys again in random order. Each pair has its own number
    of fillers, 0 to `fillers`. The target stands at the last token of each returning key. Fillers in front make all
    sequences equally long.

    A key is `key_tokens` tokens. Keys of one sequence are different, but tokens may be shared: with two tokens or more,
    no single token says which key it is. Keys, values and fillers have alphabets of their own.

    What should solve it: two lookups, one after the other. The value finds the key before it by content (the last
    token that is no filler), the returning key finds that value. A convolution of t taps binds a value to a key at most
    t - 1 tokens before it. A constant answer among the values shown is right once in `pairs`.

    Attributes:
        pairs: Pairs in a sequence.
        fillers: Most fillers between key and value.
        key_tokens: Tokens of a key.
        alphabet: Different tokens of keys, and as many of values; half as many of fillers. At least `pairs`.

    Reference:
        Recall of pairs: Arora et al. 2023, "Zoology", arXiv 2312.04927. Gaps and keys of several tokens are this
        project's own.
    """

    pairs: int = 6
    fillers: int = 6
    key_tokens: int = 1
    alphabet: int = 32

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        for name in ("pairs", "key_tokens", "alphabet"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("fillers", self.fillers, integer=True, zero=True)
        if self.alphabet < max(2, self.pairs):
            raise bad_value("alphabet", f"at least 2 and at least pairs={self.pairs}", self.alphabet)

    @property
    def inputs(self) -> int:
        """Different tokens: of keys, of values, of fillers."""
        return 2 * self.alphabet + self.alphabet // 2

    @property
    def outputs(self) -> int:
        """Different classes: the values."""
        return self.alphabet

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.pairs * (2 * self.key_tokens + 1 + self.fillers)

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw sequences, each pair with its own number of fillers.

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
        return self._ask(torch.randint(self.fillers + 1, (size, self.pairs), generator=generator), generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out sequences: those drawn as for training, and for some gaps those where all pairs have it.

        Args:
            size: Number of sequences of each kind.
            seed: Decides which ones.

        Returns:
            `{"fillers=0": batch, ..., "fillers=mixed": batch}`, with none, half and all of the fillers.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
        """
        check_positive("size", size, integer=True)
        gaps = sorted({0, self.fillers // 2, self.fillers})
        kinds = {f"fillers={gap}": torch.full((size, self.pairs), gap) for gap in gaps}
        found = {kind: self._ask(gap, held_out_stream(seed, f"gapped recall {kind}")) for kind, gap in kinds.items()}
        return found | {"fillers=mixed": self.batch(size, held_out_stream(seed, "gapped recall mixed"))}

    def _ask(self, gaps: Tensor, generator: Generator) -> Batch:
        """Draw sequences with given numbers of fillers, `[B, pairs]`."""
        size, (p, k) = len(gaps), (self.pairs, self.key_tokens)
        keys = self._keys(size, generator)  # [B, pairs, key_tokens]
        values = self.alphabet + torch.randint(self.alphabet, (size, p), generator=generator)
        tokens = 2 * self.alphabet + torch.randint(max(1, self.alphabet // 2), (size, self.length), generator=generator)
        ends = self.length - p * k  # where the returning keys begin
        # From the back: each value stands before all pairs after its own.
        after = (gaps + k + 1).flip(1).cumsum(1).flip(1)  # [B, pairs]: tokens from a pair's key to the end of the pairs
        key_at = (ends - after)[..., None] + torch.arange(k)
        value_at = ends - after + k + gaps
        tokens.scatter_(1, key_at.flatten(1), keys.flatten(1)).scatter_(1, value_at, values)
        order = torch.rand(size, p, generator=generator).argsort(1)
        tokens[:, ends:] = keys.gather(1, order[..., None].expand(-1, -1, k)).flatten(1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, ends + k - 1 :: k] = values.gather(1, order) - self.alphabet
        return Batch(tokens, targets)

    def _keys(self, size: int, generator: Generator) -> Tensor:
        """Draw different keys, `[B, pairs, key_tokens]`. Each place has few tokens to choose from: keys share them."""
        few = self.alphabet if self.key_tokens == 1 else self._shared()
        codes = torch.rand(size, few**self.key_tokens, generator=generator).topk(self.pairs).indices
        digits = codes[..., None] // few ** torch.arange(self.key_tokens) % few  # [B, pairs, key_tokens]
        tokens = torch.rand(size, self.key_tokens, self.alphabet, generator=generator).topk(few).indices
        return tokens.gather(2, digits.mT).mT

    def _shared(self) -> int:
        """Tokens at each place of a key: the fewest that make twice as many keys as there are pairs."""
        few = 2
        while few**self.key_tokens < 2 * self.pairs:
            few += 1
        return few
