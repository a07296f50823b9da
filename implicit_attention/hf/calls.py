"""Keyword arguments that transformers' models share: which are used, which are only checked, which are errors."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from implicit_attention.errors import Came, bad_type, bad_value
from implicit_attention.hf.tokens import cached_length

_KNOWN = set(TransformersKwargs.__annotations__)


def has_layers(given: object) -> bool:
    """Return whether something is a cache with an entry for each layer: `EncoderDecoderCache` holds two caches."""
    return isinstance(given, Cache) and hasattr(given, "layers")


def take_cache(cache: Cache | None, kwargs: Any) -> Cache | None:
    """Return the cache of a call, under whichever of its names it came; the old name leaves `kwargs`.

    Args:
        cache: Under its name.
        kwargs: May hold it under its old name, `past_key_values`. peft names a prefix so, next to the cache that
            `generate` keeps: the prefix is taken for an empty cache, and is not needed by one that begins with it.

    Raises:
        TypeError: If it is no cache.
        ValueError: If both are given and neither holds what the other does.
    """
    older = kwargs.pop("past_key_values", None)
    for given in (cache, older):
        if given is not None and not has_layers(given):
            raise bad_type("cache", "a transformers Cache, such as DynamicCache(config=model.config)", given)
    if older is None or older is cache:
        return cache
    if not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=3)
    if cache is None or not cached_length(cache):
        return older  # type: ignore[no-any-return]
    if not _begins_with(cache, older):
        raise bad_value("past_key_values", "None next to `cache`", Came(type(older).__name__), "Both name the same.")
    return cache


def _begins_with(cache: Cache, other: Cache) -> bool:
    """Whether the first tokens of a cache are those of another."""
    length = cached_length(other)
    keys, first = (getattr(c.layers[0], "keys", None) for c in (cache, other))
    if keys is None or first is None or keys.shape[-2] < length or isinstance(length, Tensor):
        return False
    return keys.shape[:2] == first.shape[:2] and torch.equal(keys[:, :, :length], first[:, :, :length].to(keys.dtype))


def check_others(kwargs: Any, is_causal: bool) -> None:
    """Refuse arguments that are not known, or that ask for what the models do not do.

    Args:
        kwargs: Those of a call that it does not name.
        is_causal: Of the configuration.

    Raises:
        TypeError: If one is not known.
        ValueError: If one asks for what the models do not do.
    """
    unknown = [name for name in kwargs if name not in _KNOWN]
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}. Those of transformers' models "
                        f"are known: {', '.join(sorted(_KNOWN))}.")  # fmt: skip
    if kwargs.get("output_router_logits"):
        raise bad_value("output_router_logits", "False", True, "The models have no router.")
    if kwargs.get("is_causal") not in (None, is_causal):
        raise bad_value("is_causal", f"{is_causal}, as in the configuration", kwargs["is_causal"],
                        "Make the model with another configuration.")  # fmt: skip


def check_positions(
    position_ids: Tensor | None, cache_position: Tensor | None, length: int | Tensor, x: Tensor
) -> Tensor | None:
    """Return positions as `[B, n]`, None if there are none.

    Args:
        position_ids: `[B, n]`, `[1, n]` or `[n]`.
        cache_position: `[n]`.
        length: Tokens in the cache, P.
        x: New tokens, `[B, n, D]`.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they do not fit.
    """
    batch, new = x.shape[:2]
    if cache_position is not None and not is_tracing(x):
        expected = torch.arange(new, device=cache_position.device) + length
        if tuple(cache_position.shape) != (new,) or not bool((cache_position == expected).all()):
            raise bad_value("cache_position", f"the slots after the cached tokens, {length} to {length + new - 1}",
                            cache_position, "Leave it out.")  # fmt: skip
    if position_ids is None:
        return None
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
        raise bad_type("position_ids", f"an integer tensor [{batch}, {new}]", position_ids)
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != new:
        raise bad_value("position_ids", f"of shape ({batch}, {new})", position_ids)
    return position_ids.to(x.device).expand(batch, new)
