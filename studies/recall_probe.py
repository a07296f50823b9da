"""Recall in context: a text of random tokens, something else, the same text again. How well is it said again?"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH, _COPY = 16, 12  # texts; tokens that are said again
_GAPS = {"near": 8, "far": 200}  # tokens between


@torch.no_grad()
def measure(model: Any, *, seed: int) -> dict[str, float]:
    """Return the loss in nats per token of what is said again, but for its first token, near and far.

    Args:
        model: A causal language model.
        seed: Of the texts.
    """
    return {name: _loss(model, gap, seed) for name, gap in _GAPS.items()}


def texts(vocabulary: int, gap: int, seed: int) -> Tensor:
    """Return texts: some tokens, `gap` others, and the first ones again, `[16, 24 + gap]`.

    Args:
        vocabulary: Number of tokens; of bytes, the printable ones are used.
        gap: Tokens between.
        seed: Of the random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (97, 123) if vocabulary < 300 else (vocabulary // 20, vocabulary // 2)
    said = torch.randint(low, high, (_BATCH, _COPY), generator=generator)
    between = torch.randint(low, high, (_BATCH, gap), generator=generator)
    return torch.cat([said, between, said], 1)


def _loss(model: Any, gap: int, seed: int) -> float:
    tokens = texts(model.config.vocab_size, gap, seed)
    logits = model(tokens, use_cache=False).logits[:, -_COPY:-1]
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 - _COPY :].flatten()))
