"""transformers' caches as the layer's own: queries made from equilibria stand in the place of keys."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from implicit_attention.cache import Past
from implicit_attention.errors import Came, bad_value
from implicit_attention.hf.tokens import Tokens


class ImplicitDynamicLayer(DynamicLayer):
    """What a `DynamicCache` holds for a block that `layer_types` calls "implicit"; naming it registers it."""

    _layer_type = "implicit"


class ImplicitStaticLayer(StaticLayer):
    """The same in a `StaticCache`."""

    _layer_type = "implicit"


class LayerCache:
    """One layer's part of a transformers cache, a `DynamicCache` or a `StaticCache`.

    Whatever transformers does with keys and values (beams, cropping, copies) it does with what stands for them here.
    Padding is not kept in a transformers cache: it comes anew with each call, in the attention mask.
    """

    def __init__(self, cache: Cache | None, layer_idx: int, tokens: Tokens) -> None:
        """Look at a cache.

        Args:
            cache: The cache of all layers; None if there is none, and only positions are to be told.
            layer_idx: Which of its entries is the layer's.
            tokens: What the call says of its tokens.
        """
        self.cache, self.layer_idx, self.tokens = cache, layer_idx, tokens

    def past(self) -> Past | None:
        """Return the columns so far, or none with the positions of the new tokens; None if these are their places.

        Raises:
            ValueError: If the cache does not keep all of them as they are.
        """
        length, held, positions = self.tokens.length, self.tokens.held, self.tokens.positions
        if isinstance(length, int) and length == 0:
            if positions is None:
                return None
            nothing = positions.new_empty(1, 1, 0, 1)
            return Past(nothing, nothing, None, positions)
        assert self.cache is not None
        layer = self.cache.layers[self.layer_idx]
        keys, values = (layer.keys, layer.values) if isinstance(layer, CacheLayerMixin) else (None, None)
        if keys is None or values is None or (isinstance(length, int) and keys.shape[-2] < length):
            raise bad_value("cache", "a DynamicCache or a StaticCache of full length", Came(type(self.cache).__name__),
                            "The solver needs every column as it was, not a part or a quantised copy.")  # fmt: skip
        if isinstance(length, int):
            keys, values = keys[:, :, :length], values[:, :, :length]
        elif self.tokens.order is not None:
            keys, values = keys.index_select(2, self.tokens.order), values.index_select(2, self.tokens.order)
        keys, values = kept(layer, keys), kept(layer, values)
        return Past(keys, values, held, length if positions is None else positions)

    def append(self, column: Tensor, value: Tensor, hidden: Tensor | None) -> None:
        """Take the columns of new tokens.

        Args:
            column: Queries made from their equilibria, `[B, G, n, d]`.
            value: Their values, `[B, G, n, d]`.
            hidden: `[B, n]`, True = padding. Not kept: see above.
        """
        if self.cache is not None:
            dtype = held_dtype(self.cache, self.layer_idx) or value.dtype
            self.cache.update(column.to(dtype), value.to(dtype), self.layer_idx)


def held_dtype(cache: Cache, layer_idx: int) -> torch.dtype | None:
    """Return the dtype that a cache holds a layer's columns in; None if it holds none yet.

    A model may go on in another one, as where autocast begins or ends, and a static cache takes its own alone.

    Args:
        cache: The cache.
        layer_idx: The layer.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    held = layer.keys if isinstance(layer, CacheLayerMixin) and layer.is_initialized else None
    return None if held is None else held.dtype


def kept(layer: object, columns: Tensor) -> Tensor:
    """Return columns that a graph may keep: a static cache changes its own, and autograd takes none of inference mode.

    Args:
        layer: The layer of the cache that holds them.
        columns: Some of its columns or values.
    """
    if not torch.is_grad_enabled():
        return columns
    foreign = not torch.compiler.is_compiling() and columns.is_inference()  # the compiler cannot ask
    return columns.clone() if foreign or isinstance(layer, StaticLayer) else columns
