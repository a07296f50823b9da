"""A call of a model that raises leaves its cache as it was: the tokens of all layers, or of none."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from implicit_attention.hf.calls import has_layers
from implicit_attention.inputs import refuse_recomputation


def transactional(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward that puts the caches among its arguments back if it raises, an interrupt included.

    A compiled graph cannot do so: `level` does it at the next call.

    Args:
        forward: The method.
    """

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches = [value for value in (*args, *kwargs.values()) if has_layers(value)]
        if not caches or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        refuse_recomputation()
        before = [_Before.of(cache) for cache in caches]
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            for state in before:
                state.restore()
            raise

    return call


def level(cache: Cache | None, layers: int) -> None:
    """Take back what a compiled call that raised has added to a static cache.

    Its first layers then hold tokens that the one that raised does not. The shortest is what all held before.

    Args:
        cache: The cache of a call that begins.
        layers: How many of its layers the model uses.
    """
    used = [] if cache is None else [c for c in cache.layers[:layers] if isinstance(c, StaticLayer)]
    lengths = [layer.cumulative_length for layer in used if layer.is_initialized]
    if len(lengths) > 1:
        shortest = torch.stack([length.to(lengths[0].device) for length in lengths]).amin()
        for length in lengths:
            length.copy_(shortest)


class _Before(NamedTuple):
    """A cache as it was.

    Attributes:
        cache: The cache.
        layers: Its layers: some caches add them when they are used.
        attributes: Of each layer. New columns are joined to the tensors, or written behind those that count.
        changed: Tensors that are changed in place, with what they held.
    """

    cache: Cache
    layers: list[Any]
    attributes: list[dict[str, Any]]
    changed: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, cache: Cache) -> "_Before":
        layers = list(cache.layers)
        changed = [
            (value, value.detach().clone())
            for layer in layers
            for value in vars(layer).values()
            if isinstance(value, Tensor) and (value.dim() == 0 or isinstance(layer, StaticSlidingWindowLayer))
        ]
        return cls(cache, layers, [dict(vars(layer)) for layer in layers], changed)

    def restore(self) -> None:
        self.cache.layers[:] = self.layers
        for layer, attributes in zip(self.layers, self.attributes, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)
        with torch.no_grad():
            for tensor, held in self.changed:
                tensor.copy_(held)
