"""Word problems of small groups: the product of all elements so far, at every position."""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from implicit_attention.errors import check_choice
from implicit_attention.tasks.prefixes import PrefixTask
from implicit_attention.tasks.task import Batch

_DEGREE = {"S3": 3, "A5": 5}


@dataclass(frozen=True)
class GroupWords(PrefixTask):
    """Predict the product of all permutations so far. Each token is a random element of a group.

    S3 is the smallest group that is not commutative; it is solvable. A5 is the smallest group that is not solvable. Its
    word problem is complete for NC1: no transformer of a fixed depth is believed to solve it at all lengths. A constant
    answer is right once in 6, or once in 60.

    Elements are numbered in the lexicographic order of their permutations, written as tuples `p` that map t to `p[t]`.
    A5 has the even ones. In a product the earlier permutations come first: `(p q)[t] = q[p[t]]`.

    Attributes:
        train_length: Tokens in a training sequence.
        judged: Lengths of held-out sequences.
        group: "S3" (6 elements) or "A5" (60).

    Reference:
        Merrill, Petty and Sabharwal 2024, "The illusion of state in state-space models", arXiv 2404.08819; Liu et
        al. 2023, "Transformers learn shortcuts to automata", arXiv 2210.10749. The lengths are this project's own.
    """

    train_length: int = 32
    judged: tuple[int, ...] = (32, 64, 128)
    group: str = "S3"

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        super().__post_init__()
        check_choice("group", self.group, tuple(_DEGREE))

    @property
    def inputs(self) -> int:
        """Different tokens: the group's elements."""
        return len(_products(self.group))

    @property
    def outputs(self) -> int:
        """Different classes: the group's elements."""
        return self.inputs

    def draw(self, size: int, length: int, generator: Generator) -> Batch:
        """Draw random elements and their prefix products; see `PrefixTask.draw`."""
        words = torch.randint(self.inputs, (size, length), generator=generator)
        return Batch(words, _running_products(words, _products(self.group)))


def _running_products(words: Tensor, products: Tensor) -> Tensor:
    """Prefix products `[B, N]` in log2 N rounds. Each round multiplies products of s elements by the s before them."""
    running, span = words.clone(), 1
    while span < words.shape[1]:
        running[:, span:] = products[running[:, :-span], running[:, span:]]
        span *= 2
    return running


@functools.cache
def _products(group: str) -> Tensor:
    """The table of products of a group, `[elements, elements]`, by their numbers."""
    permutations = itertools.permutations(range(_DEGREE[group]))
    elements = [p for p in permutations if group[0] == "S" or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[number[tuple(q[t] for t in p)] for q in elements] for p in elements])


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
