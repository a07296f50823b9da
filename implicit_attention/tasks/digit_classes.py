"""Handwritten digits: which one an image shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.digits import PIXELS, digits, placed
from implicit_attention.tasks.judging import held_out_stream
from implicit_attention.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class DigitClasses:
    """Say which digit an image shows. Every position sees all others.

    The data and their split are those of `Digits`. A position has 65 features: the value of its pixel, 0 to 1, and its
    place as one of 64, for which a linear embedding learns a vector each. The answer of a model is the mean of its
    logits over the positions. The first position has the target, all others none.

    Reference:
        Alpaydin and Kaynak 1998, as in `Digits`.
    """

    is_causal: ClassVar[bool] = False
    inputs: ClassVar[int] = 1 + PIXELS
    outputs: ClassVar[int] = 10
    length: ClassVar[int] = PIXELS
    score: ClassVar[str] = "accuracy"

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw training images with replacement.

        Args:
            size: Number of images, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Features `[B, 64, 65]`, float32, and targets `[B, 64]`, int64.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
            ImportError: If scikit-learn is missing.
        """
        check_positive("size", size, integer=True)
        split = digits()
        chosen = torch.randint(len(split.training), (size,), generator=generator)
        return _shown(split.training[chosen], split.training_labels[chosen])

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out images in random order, as many as there are at most.

        Args:
            size: Number of images.
            seed: Decides which ones.

        Returns:
            `{"held_out": batch}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
            ImportError: If scikit-learn is missing.
        """
        check_positive("size", size, integer=True)
        split = digits()
        chosen = torch.randperm(len(split.held_out), generator=held_out_stream(seed, "digit classes"))[:size]
        return {"held_out": _shown(split.held_out[chosen], split.held_out_labels[chosen])}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the images' classes, in nats.

        Args:
            logits: `[B, 64, 10]`.
            batch: The batch they answer.
        """
        return F.cross_entropy(_pooled(logits, batch), batch.targets[:, 0])

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return the share of images whose digit is right, as "accuracy".

        Args:
            logits: `[B, 64, 10]`.
            batch: The batch they answer.
        """
        return {"accuracy": float((_pooled(logits, batch).argmax(-1) == batch.targets[:, 0]).float().mean())}


def _pooled(logits: Tensor, batch: Batch) -> Tensor:
    """The mean over the positions, `[B, 10]`, float32 or wider."""
    if logits.dim() != 3 or logits.shape[:2] != batch.targets.shape:
        raise bad_value("logits", f"of shape [B, N, outputs] with [B, N] = {list(batch.targets.shape)}", logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).mean(1)


def _shown(images: Tensor, labels: Tensor) -> Batch:
    targets = torch.full(images.shape, IGNORED)
    targets[:, 0] = labels
    return Batch(placed(images), targets)
