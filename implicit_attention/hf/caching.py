"""transformers' caches as the layer's own: queries made from equilibria stand in the place of keys."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from implicit_attention.cache import Past
from implicit_attention.errors import Came, bad_value


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

    def __init__(self, cache: Cache, layer_idx: int, hidden: Tensor | None = None) -> None:
        """Look at a cache.

        Args:
            cache: The cache of all layers.
            layer_idx: Which of its entries is the layer's.
            hidden: `[B, P + n]`, True where a token, old or new, is padding; None if none is.
        """
        self.cache, self.layer_idx, self.hidden = cache, layer_idx, hidden
        self.length = int(cache.get_seq_length(layer_idx))

    @property
    def new_hidden(self) -> Tensor | None:
        """Which of the new tokens are padding, `[B, n]`; None if none is, as when a batch is continued."""
        if self.hidden is None:
            return None
        new = self.hidden[:, self.length :]
        return new if torch.compiler.is_compiling() or bool(new.any()) else None

    def past(self) -> Past | None:
        """Return the columns so far, None if there are none.

        Raises:
            ValueError: If the cache does not keep all of them as they are.
        """
        if self.length == 0:
            return None
        layer, hidden = self.cache.layers[self.layer_idx], self.hidden
        keys, values = (layer.keys, layer.values) if isinstance(layer, CacheLayerMixin) else (None, None)
        if keys is None or values is None or keys.shape[-2] < self.length:
            raise bad_value("cache", "a DynamicCache or a StaticCache of full length", Came(type(self.cache).__name__),
                            "The solver needs every column as it was, not a part or a quantised copy.")  # fmt: skip
        held = slice(0, self.length)
        keys, values = kept(layer, keys[:, :, held]), kept(layer, values[:, :, held])
        return Past(keys, values, None if hidden is None else hidden[:, held], self.length)

    def append(self, column: Tensor, value: Tensor, hidden: Tensor | None) -> None:
        """Take the columns of new tokens.

        Args:
            column: Queries made from their equilibria, `[B, G, n, d]`.
            value: Their values, `[B, G, n, d]`.
            hidden: `[B, n]`, True = padding. Not kept: see above.
        """
        self.cache.update(column.to(value.dtype), value, self.layer_idx)


def kept(layer: object, columns: Tensor) -> Tensor:
    """Return columns that a graph may keep: a static cache changes its own, and autograd takes none of inference mode.

    Args:
        layer: The layer of the cache that holds them.
        columns: Some of its columns or values.
    """
    changes = isinstance(layer, StaticLayer) or columns.is_inference()
    return columns.clone() if changes and torch.is_grad_enabled() else columns
