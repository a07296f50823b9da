"""Handwritten digits: half of the pixels are hidden and predicted from the other half."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from implicit_attention.errors import bad_value, check_positive
from implicit_attention.tasks.judging import asked_logits, held_out_stream
from implicit_attention.tasks.task import Batch

PIXELS, _WHITE = 64, 16.0  # 8 x 8, in whole numbers from 0 to 16
_HELD_OUT = 5  # one image of this many


@dataclass(frozen=True)
class Digits:
    """Predict the value of each hidden pixel. Every position sees all others.

    The data are the 1797 images of 8 x 8 pixels of scikit-learn, as 64 positions in row order, scaled to 0 ... 1.
    In every image drawn, `masked` random pixels are hidden. A position has 66 features: its value (0 if hidden),
    whether it is hidden, 0 or 1, and its place as one of 64, for which a linear embedding learns a vector each. Targets
    are the hidden values, NaN elsewhere.

    A fifth of the images is held out, chosen by a hash of their index. The split is not by writer, since scikit-learn
    does not say who wrote which. The mean of each pixel over the training images has a squared error of 0.073 on the
    held-out ones; one number for all pixels has 0.141.

    Attributes:
        masked: Hidden pixels, 1 to 64.

    Reference:
        Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository, its
        test set, as in `sklearn.datasets.load_digits`.
    """

    masked: int = 32

    is_causal: ClassVar[bool] = False
    inputs: ClassVar[int] = 2 + PIXELS
    outputs: ClassVar[int] = 1
    length: ClassVar[int] = PIXELS
    score: ClassVar[str] = "-squared_error"

    def __post_init__(self) -> None:
        """Refuse more pixels than an image has."""
        check_positive("masked", self.masked, integer=True)
        if self.masked > PIXELS:
            raise bad_value("masked", f"at most {PIXELS}, the pixels of an image", self.masked)

    def batch(self, size: int, generator: Generator) -> Batch:
        """Draw training images with replacement, each with its own mask.

        Args:
            size: Number of images, B.
            generator: Source of the randomness, on the CPU.

        Returns:
            Features `[B, 64, 66]` and targets `[B, 64]`, float32.

        Raises:
            TypeError: If `size` is no integer.
            ValueError: If it is not positive.
            ImportError: If scikit-learn is missing.
        """
        check_positive("size", size, integer=True)
        images = digits().training
        return self._hide(images[torch.randint(len(images), (size,), generator=generator)], generator)

    def held_out(self, size: int, seed: int) -> Mapping[str, Batch]:
        """Return held-out images in random order, each with its own mask.

        Args:
            size: Number of images. If it is more than there are, every image comes once before any comes twice.
            seed: Decides which images, and which of their pixels are hidden.

        Returns:
            `{"held_out": batch}`.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If `size` is not positive, or `seed` negative.
            ImportError: If scikit-learn is missing.
        """
        check_positive("size", size, integer=True)
        stream, images = held_out_stream(seed, "digits"), digits().held_out
        rounds = [torch.randperm(len(images), generator=stream) for _ in range(-(-size // len(images)))]
        return {"held_out": self._hide(images[torch.cat(rounds)[:size]], stream)}

    def _hide(self, images: Tensor, generator: Generator) -> Batch:
        chosen = torch.rand(images.shape, generator=generator).topk(self.masked).indices
        hidden = torch.zeros_like(images, dtype=torch.bool).scatter_(1, chosen, True)
        shown = images.masked_fill(hidden, 0.0)
        return Batch(placed(shown, hidden.float()), images.masked_fill(~hidden, float("nan")))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error over hidden pixels.

        Args:
            logits: `[B, 64, 1]`, values of pixels.
            batch: The batch they answer.

        Returns:
            A scalar, float32 or wider.

        Raises:
            ValueError: If `logits` is not of that shape.
        """
        if logits.shape[-1] != 1:
            raise bad_value("logits", "of shape [B, 64, 1]", logits)
        asked = ~batch.targets.isnan()
        error: Tensor = asked_logits(logits, asked)[:, 0] - batch.targets[asked]
        return error.square().mean()

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Return how well images were completed.

        Args:
            logits: `[B, 64, 1]`, values of pixels.
            batch: The batch they answer.

        Returns:
            "squared_error", the mean over hidden pixels, on the scale of 0 to 1; "-squared_error" is larger for
            better ones.
        """
        error = float(self.loss(logits, batch))
        return {"-squared_error": -error, "squared_error": error}


def placed(*features: Tensor) -> Tensor:
    """Return features of the pixels together with each pixel's place, one number for each of the 64.

    Args:
        features: F tensors `[B, 64]`.

    Returns:
        `[B, 64, F + 64]`.
    """
    places = torch.eye(PIXELS, dtype=features[0].dtype).expand(len(features[0]), -1, -1)
    return torch.cat([torch.stack(features, -1), places], -1)


class Split(NamedTuple):
    """The images, in two parts.

    Attributes:
        training: `[n, 64]`, float32, from 0 to 1.
        held_out: `[m, 64]`, the same.
        training_labels: `[n]`, int64, the digits that the images show.
        held_out_labels: `[m]`, the same.
    """

    training: Tensor
    held_out: Tensor
    training_labels: Tensor
    held_out_labels: Tensor


@functools.cache
def digits() -> Split:
    """Return scikit-learn's digits, a fifth of them held out by a hash of their index.

    Returns:
        The two parts, in the order of the images.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError("the digits task needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.tensor(bunch.data / _WHITE, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    hashes = (hashlib.sha256(str(i).encode()).digest() for i in range(len(images)))
    kept = torch.tensor([int.from_bytes(digest, "big") % _HELD_OUT == 0 for digest in hashes])
    return Split(images[~kept], images[kept], labels[~kept], labels[kept])
