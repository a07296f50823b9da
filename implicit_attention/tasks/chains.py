"""Chains of assignments in the order of the text: values that are looked up again."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.judging import Answers, held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class Chains(Answers):
    """Predict the value of each variable of a program of assignments.

    Line j is *source, name*: the variable `name` gets the value of `source`. The first `chains` lines have a value as
    their source. Each later line has the newest name of one of the chains, and is that chain's newest from then on. So
    a line's depth is its place in its chain. Names of a program are different. The target stands at each name.

    Each program draws how often it goes on with which chain, so some chains become long.

    What should solve it: a lookup of a looked-up value, once for each step of depth. L layers of attention follow about
    L steps, or double what they know in each. One pass follows all steps if what a row has found is what later rows
    read. A constant answer is right once in `chains`.

    Attributes:
        lines: Assignments in a program.
        chains: Chains in it.
        judged: Depths of held-out targets, below `lines - chains + 2`.
        values: Different values.

    Reference:
        This project's own. Programs of assignments as a probe of models: "variable tracking" of Hsieh et al. 2024,
        "RULER", arXiv 2404.06654.
    """

    lines: int = 32
    chains: int = 4
    judged: tuple[int, ...] = (1, 2, 4, 8, 16)
    values: int = 16

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        for name in ("lines", "chains", "values"):
            check_positive(name, getattr(self, name), integer=True)
        if self.lines < self.chains:
            raise bad_value("lines", f"at least chains={self.chains}", self.lines)
        deepest = self.lines - self.chains + 1
        if not self.judged or not all(1 <= depth <= deepest for depth in self.judged):
            raise bad_value("judged", f"depths from 1 to lines - chains + 1 = {deepest}", self.judged)

    @property
    def inputs(self) -> int:
        """Different tokens: values, then names."""
        return self.values + 2 * self.lines

    @property
    def outputs(self) -> int:
        """Different classes: the values."""
        return self.values

    @property
    def length(self) -> int:
        """Tokens in a program."""
        return 2 * self.lines

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw programs.

        Args:
            size: Number of programs, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Tokens and targets, both `[B, 2 lines]`, int64; every name is asked for.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
        """
        check_positive("size", size, integer=True)
        return self._drawn(size, generator)[0]

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out programs for every depth, with only the names of that depth asked for.

        Args:
            size: Number of programs of each depth.
            seed: Decides which ones.

        Returns:
            `{"depth=1": batch, "depth=2": batch, ...}`. A depth that no program has is asked for nowhere.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
        """
        check_positive("size", size, integer=True)
        found = {}
        for wanted in self.judged:
            (tokens, targets), depth = self._drawn(size, held_out_stream(seed, f"chains {wanted}"))
            found[f"depth={wanted}"] = Batch(tokens, targets.masked_fill(depth != wanted, IGNORED))
        return found

    def _drawn(self, size: int, generator: Generator) -> tuple[Batch, Tensor]:
        """Programs, and the depth of each position's line, `[B, 2 lines]`."""
        names = self.values + torch.rand(size, 2 * self.lines, generator=generator).topk(self.lines).indices
        chain = self._chain_of_lines(size, generator)  # [B, lines]
        member = chain[..., None] == torch.arange(self.chains)  # [B, lines, chains]
        depth = member.cumsum(1).gather(2, chain[..., None])[..., 0]
        value = torch.randint(self.values, (size, self.chains), generator=generator).gather(1, chain)
        source = torch.where(depth == 1, value, names.gather(1, self._line_before(chain, depth)))
        tokens = torch.stack([source, names], -1).flatten(1)
        targets = torch.stack([torch.full_like(value, IGNORED), value], -1).flatten(1)
        return Batch(tokens, targets), depth.repeat_interleave(2, 1)

    def _chain_of_lines(self, size: int, generator: Generator) -> Tensor:
        """Draw the chain of each line, `[B, lines]`; the first line of each chain comes first."""
        often = (3 * torch.randn(size, self.chains, generator=generator)).softmax(-1)
        first = torch.arange(self.chains).expand(size, -1)
        later = self.lines - self.chains
        if not later:
            return first
        return torch.cat([first, torch.multinomial(often, later, replacement=True, generator=generator)], 1)

    def _line_before(self, chain: Tensor, depth: Tensor) -> Tensor:
        """Return the line before each one in its chain, `[B, lines]`; itself for the first."""
        order = (chain * (self.lines + 1) + depth).argsort(1)  # lines of a chain together, in their order
        before = torch.empty_like(order).scatter_(1, order, order.roll(1, 1))
        return torch.where(depth == 1, torch.arange(self.lines), before)
