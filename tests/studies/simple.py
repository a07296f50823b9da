"""The smallest task there is, and a table of it that takes no time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from implicit_attention.tasks import Batch
from studies import ARMS, Sizes, Table
from studies.run import Training
from studies.table import Row

SIZES = Sizes(embed_dim=16, num_heads=2, mlp=64, max_distance=4, loops=2, kernel="torch")
TRAINING = Training(steps=4, batch_size=4, evaluate_every=2, held_out=8, rates=(1e-3, 1e-2))


@dataclass(frozen=True)
class Before:
    """Which token stood before?"""

    length: int = 12
    is_causal: bool = True
    inputs: ClassVar[int] = 5
    outputs: ClassVar[int] = 5
    score: ClassVar[str] = "accuracy"

    def batch(self, size, generator):
        tokens = torch.randint(self.inputs, (size, self.length), generator=generator)
        return Batch(tokens, tokens.roll(1, 1))

    def held_out(self, size, seed):
        return {"held_out": self.batch(size, torch.Generator().manual_seed(1 << 31 | seed))}

    def loss(self, logits, batch):
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), batch.targets[:, 1:].flatten())

    def scores(self, logits, batch):
        return {"accuracy": float((logits.argmax(-1) == batch.targets)[:, 1:].float().mean())}


def table(*arms, training=TRAINING, seeds=2):
    rows = {name: Row(name, ARMS[name].title, SIZES) for name in arms or ("ordinary", "implicit")}
    return Table("before", "before", "The token before", Before(), rows, training, seeds)
