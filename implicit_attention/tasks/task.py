"""The interface of tasks: training batches, held-out batches, a loss and scores."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Generator, Tensor

IGNORED = -100  # target of a position without a target, as in torch's cross-entropy


class Batch(NamedTuple):
    """Sequences, and the target of each position.

    Attributes:
        inputs: Tokens `[B, N]`, int64; or features `[B, N, F]`, float32.
        targets: Classes `[B, N]`, int64, `IGNORED` where there is no target; or numbers `[B, N]`, float32, NaN where
            there is no target.
    """

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """A task. Frozen dataclasses implement it; a property here may be a field there."""

    @property
    def is_causal(self) -> bool:
        """Whether a position sees only earlier ones."""

    @property
    def inputs(self) -> int:
        """Different tokens, or features of a position."""

    @property
    def outputs(self) -> int:
        """Different classes; 1 for numbers."""

    @property
    def length(self) -> int:
        """Longest sequence, training or held out."""

    @property
    def score(self) -> str:
        """Name of the deciding score in `scores`. Larger is better."""

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw training sequences."""

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out sequences by the name of their kind (lengths, hops, ...)."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of logits `[B, N, outputs]`, a scalar."""

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return the scores of logits `[B, N, outputs]`, by name."""
