"""Running parity, trained on short sequences and evaluated on long ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from implicit_attention.tasks.prefixes import PrefixTask
from implicit_attention.tasks.task import Batch


@dataclass(frozen=True)
class Parity(PrefixTask):
    """Predict at every position of random bits whether the number of ones so far is odd.

    A constant answer is right half the time. Transformers learn parity at the lengths they train on, and fail at longer
    ones. The published protocol trains on lengths of 1 to 40 and tests up to 500, with a target only at the end. Here
    every prefix has a target, and the longest sequence has 256 tokens. Held-out sequences are new only if 2**N is many
    times the number of training sequences.

    Attributes:
        train_length: Tokens in a training sequence.
        judged: Lengths of held-out sequences.

    Reference:
        Hahn 2020, "Theoretical limitations of self-attention in neural sequence models", arXiv 1906.06755;
        Delétang et al. 2023, "Neural networks and the Chomsky hierarchy", arXiv 2207.02098, "Parity Check".
    """

    train_length: int = 40
    judged: tuple[int, ...] = (40, 64, 128, 256)

    inputs: ClassVar[int] = 2
    outputs: ClassVar[int] = 2

    def draw(self, size: int, length: int, generator: Generator) -> Batch:
        """Draw random bits and their running parity; see `PrefixTask.draw`."""
        bits = torch.randint(2, (size, length), generator=generator)
        return Batch(bits, bits.cumsum(1) % 2)
