"""From a layer and its inputs to the equation that is solved: everything that does not depend on y."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_attention import masks
from implicit_attention.attention_map import AttentionMap, QueryMap, merge_heads, rms_norm, split_heads
from implicit_attention.cache import Cache, DecodeCache, Past
from implicit_attention.errors import Came, bad_type, bad_value
from implicit_attention.inputs import check_input
from implicit_attention.kernels import AttentionSpec
from implicit_attention.kernels.spec import BiasTerm
from implicit_attention.positions import Positions, rotate
from implicit_attention.solvers import Method


class Layer(Protocol):
    """What the equation is made from: settings and parameters of `ImplicitQueryAttention`, under its names."""

    embed_dim: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    is_causal: bool
    window: int | None
    self_query: str
    normalize_over: str
    qk_norm: bool
    dropout: float
    scale: float
    training: bool
    Omega_Q: nn.Linear
    W_K: nn.Linear
    Omega_V: nn.Linear | None
    W_Q: nn.Linear | None
    temperature: nn.Parameter | None
    positions: Positions | None
    solver: Method

    @property
    def triangular(self) -> bool:
        """Whether row i depends on rows j <= i alone."""


class Equation(NamedTuple):
    """The fixed-point equation that a layer solves for given inputs: `y = function(y, *args)`.

    Attributes:
        function: The map.
        args: Its tensors, differentiable in the layer's parameters and inputs.
        start: Where solvers start, the values `[B, N, D]`.
    """

    function: AttentionMap
    args: tuple[Tensor, ...]
    start: Tensor


def prepare(
    layer: Layer,
    x: Tensor,
    context: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cache: Cache | None,
) -> tuple[Equation, bool]:
    """Check the inputs and prepare everything that does not depend on y.

    Args:
        layer: The layer.
        x: As in `ImplicitQueryAttention.forward`, as are the others.
        context: Where keys and values come from.
        attn_mask: Of rows by columns.
        key_padding_mask: Of columns.
        cache: The tokens before x.

    Returns:
        The equation, and whether x had a batch dimension.

    Raises:
        TypeError: If a tensor is of the wrong type.
        ValueError: If one does not fit.
    """
    x, context, key_padding_mask, batched = _check(layer, x, context, key_padding_mask)
    source = x if context is None else context
    by_keys, groups = layer.normalize_over == "queries", layer.num_kv_heads
    key = split_heads(layer.W_K(source), layer.num_heads if by_keys else groups)
    dtype = key.dtype
    value = split_heads(_values(layer, source, dtype), groups)
    past = None if cache is None else _past(layer, cache, context, value, key_padding_mask)
    if layer.temperature is not None:
        key = rms_norm(key) * layer.temperature[:, None, None].to(dtype)
    tensors = _query_tensors(layer, x, dtype, past)
    rotation = _rotation(layer, source, dtype, past)
    if rotation is not None:
        key = rotate(key, rotation)
    if set(tensors) == {"weight"} and layer.num_heads == 1 and not layer.qk_norm:
        key = key @ tensors.pop("weight")  # k . Omega_Q y = (Omega_Q^T k) . y: queries are y itself
    tensors |= {"key": key, "value": value}
    if past is not None:
        tensors |= {"past_column": past.column, "past_value": past.value}
        key_padding_mask = _padding(past, key_padding_mask, x.shape[-2])
    # A start of its own: torch.compile rebuilds outputs that are views of each other wrongly.
    own = value if context is None else split_heads(_values(layer, x, dtype), groups)
    start = merge_heads(own.repeat_interleave(layer.num_heads // groups, 1)).clone()
    query_map = QueryMap(groups if by_keys else layer.num_heads, layer.qk_norm)
    if layer.self_query == "input":
        queries = query_map(start, *(tensors.get(n) for n in QueryMap.names))
        queries = queries.repeat_interleave(layer.num_heads // groups, 1)
        tensors["self_score"] = (key * queries).sum(-1) * layer.scale
    before = 0 if past is None else past.value.shape[-2]
    terms = _terms(layer, key, x.shape[-2], attn_mask, key_padding_mask, before)
    tensors |= {f"term{i}": tensor for i, (_, tensor) in enumerate(terms)}
    dropout = layer.dropout if layer.training else 0.0
    if dropout:
        tensors["seeds"] = torch.randint(2**62, x.shape[:1], device=x.device)
    spec = AttentionSpec(layer.scale, layer.is_causal, tuple(term for term, _ in terms), dropout, layer.window)
    function = AttentionMap(spec, query_map, by_keys, tuple(tensors))
    return Equation(function, tuple(tensors.values()), start), batched


def _past(
    layer: Layer, cache: Cache, context: Tensor | None, value: Tensor, key_padding_mask: Tensor | None
) -> Past | None:
    """Refuse a cache that does not fit before anything is solved; return what it holds."""
    if not layer.is_causal:
        raise bad_value(
            "cache", "None unless is_causal=True", Came("a cache"), "Later tokens would change earlier ones."
        )
    if context is not None:
        raise bad_value("cache", "None next to a context", Came("a cache"), "The context stands in its place.")
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise bad_type("key_padding_mask", "bool with a cache", key_padding_mask)
    if isinstance(cache, DecodeCache):
        cache.check(value)
    return cache.past()


def _values(layer: Layer, source: Tensor, dtype: torch.dtype) -> Tensor:
    return source.to(dtype) if layer.Omega_V is None else layer.Omega_V(source).to(dtype)


def _query_tensors(layer: Layer, x: Tensor, dtype: torch.dtype, past: Past | None) -> dict[str, Tensor]:
    """The tensors of phi, by name."""
    tensors = {"weight": layer.Omega_Q.weight.to(dtype)}
    if layer.Omega_Q.bias is not None:
        tensors["bias"] = layer.Omega_Q.bias.to(dtype)
    if layer.W_Q is not None:
        tensors["added"] = layer.W_Q(x).to(dtype)
    rotation = _rotation(layer, x, dtype, past)
    return tensors if rotation is None else tensors | {"rotation": rotation}


def _rotation(layer: Layer, tokens: Tensor, dtype: torch.dtype, past: Past | None) -> Tensor | None:
    if layer.positions is None:
        return None
    return layer.positions.rotation(tokens.shape[-2], tokens.to(dtype), 0 if past is None else past.position)


def _terms(
    layer: Layer, key: Tensor, rows: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None, past: int
) -> list[tuple[BiasTerm, Tensor]]:
    batch, cols = len(key), past + key.shape[2]
    terms = masks.mask_terms(
        attn_mask, key_padding_mask, batch=batch, heads=layer.num_heads, rows=rows, cols=cols, like=key, past=past
    )
    bias = None if layer.positions is None else layer.positions.bias()
    return terms if bias is None else [*terms, bias]


def _check(
    layer: Layer, x: Tensor, context: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """Refuse inputs that do not fit; return them with a batch dimension, and whether they had one."""
    check_input("x", x, layer.W_K.weight, layer.embed_dim)
    if context is not None:
        check_input("context", context, layer.W_K.weight, layer.embed_dim)
        if layer.normalize_over != "keys":
            raise bad_value("context", 'None unless normalize_over="keys"', context,
                            "Rows that belong to keys have no query side of their own to attend from.")  # fmt: skip
        if context.dim() != x.dim() or context.shape[:-2] != x.shape[:-2]:
            raise bad_value("context", f"batched like x, {tuple(x.shape)}", context)
        if layer.is_causal and context.shape[-2] != x.shape[-2]:
            raise bad_value("context", f"as long as x ({x.shape[-2]}) in a causal layer", context,
                            "Rows and columns are aligned at the first token.")  # fmt: skip
    if x.dim() == 3:
        return x, context, key_padding_mask, True
    if isinstance(key_padding_mask, Tensor) and key_padding_mask.dim() == 1:
        key_padding_mask = key_padding_mask[None]
    return x[None], None if context is None else context[None], key_padding_mask, False


def _padding(past: Past, new: Tensor | None, count: int) -> Tensor | None:
    """Which columns are hidden, those of the cache first, `[B, P + n]`; None if none are."""
    if past.hidden is None and new is None:
        return None
    batch, length = len(past.value), past.value.shape[-2]
    held = past.value.new_zeros(batch, length, dtype=torch.bool) if past.hidden is None else past.hidden
    return torch.cat([held, held.new_zeros(batch, count) if new is None else new], 1)
