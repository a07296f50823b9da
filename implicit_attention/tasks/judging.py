"""Evaluation that tasks share: random streams that training never uses, and the loss and accuracy of classes."""

import hashlib
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.task import IGNORED, Batch

_UPPER_HALF = 1 << 31  # of the 32 bits of a seed that torch's generator on the CPU reads


def held_out_stream(seed: int, kind: str) -> Generator:
    """Return the random stream of one kind of held-out sequences.

    Its generator is seeded in the upper half of the seeds, so a training stream seeded below 2**31 is another
    stream. That the other stream draws the same sequence by chance has the odds of drawing that sequence: a task
    with few possible sequences has no unseen ones, whatever its streams.

    Args:
        seed: Seed of the held-out sequences.
        kind: Name of the kind; every kind has its own stream.

    Returns:
        A generator on the CPU.

    Raises:
        TypeError: If `seed` is no integer.
        ValueError: If it is negative.
    """
    check_positive("seed", seed, integer=True, zero=True)
    digest = hashlib.sha256(f"{seed} {kind}".encode()).digest()
    return Generator().manual_seed(_UPPER_HALF | int.from_bytes(digest[:4], "big") >> 1)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, in nats, over the positions that have a target.

    Args:
        logits: `[B, N, outputs]`.
        batch: A batch whose targets are classes.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: If the logits are not of the batch's shape.
    """
    asked = batch.targets != IGNORED
    chosen = asked_logits(logits, asked)
    return F.cross_entropy(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), batch.targets[asked])


def accuracy(logits: Tensor, batch: Batch) -> float:
    """Return the share of right answers among the positions that have a target; NaN if there are none.

    Args:
        logits: `[B, N, outputs]`.
        batch: A batch whose targets are classes.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: If the logits are not of the batch's shape.
    """
    asked = batch.targets != IGNORED
    return float((asked_logits(logits, asked).argmax(-1) == batch.targets[asked]).float().mean())


def asked_logits(logits: Tensor, asked: Tensor) -> Tensor:
    """Return the logits of the positions that have a target.

    Args:
        logits: `[B, N, outputs]`.
        asked: `[B, N]`, bool.

    Returns:
        `[asked, outputs]`.

    Raises:
        ValueError: If the logits are not of the batch's shape.
    """
    if logits.dim() != 3 or logits.shape[:2] != asked.shape:
        raise bad_value("logits", f"of shape [B, N, outputs] with [B, N] = {list(asked.shape)}", logits)
    chosen: Tensor = logits[asked]
    return chosen


class Answers:
    """Base of causal tasks whose targets are classes, judged by the share of right ones."""

    is_causal: ClassVar[bool] = True
    score: ClassVar[str] = "accuracy"

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the positions that have a target, in nats.

        Args:
            logits: `[B, N, outputs]`.
            batch: The batch they answer.
        """
        return cross_entropy(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return the share of right answers, as "accuracy".

        Args:
            logits: `[B, N, outputs]`.
            batch: The batch they answer.
        """
        return {"accuracy": accuracy(logits, batch)}
