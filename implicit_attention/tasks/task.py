"""What every task is: batches to learn from, held-out batches to be judged on, a loss and scores."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Generator, Tensor

IGNORED = -100  # target of a position that nothing is asked about, as in torch's cross-entropy


class Batch(NamedTuple):
    """Sequences, and what should be said at each of their positions.

    Attributes:
        inputs: Tokens `[B, N]`, int64; or features `[B, N, F]`, float32.
        targets: Classes `[B, N]`, int64, `IGNORED` where nothing is asked; or numbers `[B, N]`, float32, NaN where
            nothing is asked.
    """

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """A task. Frozen dataclasses whose fields are its sizes implement it: what is a property here may be a field."""

    @property
    def is_causal(self) -> bool:
        """Whether a position sees earlier ones alone."""

    @property
    def inputs(self) -> int:
        """Different tokens, or features of a position."""

    @property
    def outputs(self) -> int:
        """Different classes; 1 for numbers."""

    @property
    def length(self) -> int:
        """Longest sequence, of training or of judging."""

    @property
    def score(self) -> str:
        """Name of the score that decides, in `scores`; larger is better."""

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw sequences to learn from."""

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return sequences to be judged on, of each kind by name (lengths, hops, ...), never trained on."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of logits `[B, N, outputs]`, a scalar."""

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return what is reported of logits `[B, N, outputs]`, by name."""
