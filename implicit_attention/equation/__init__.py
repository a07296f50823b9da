"""From a layer and the inputs of a call to the equation that is solved: everything that does not depend on y."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.gain import centred, gain, hidden_columns
from implicit_attention.attention.map import AttentionMap, QueryMap, ValueMap, for_heads, merge_heads, split_heads
from implicit_attention.attention.masks import mask_terms
from implicit_attention.attention.positions import rotate
from implicit_attention.attention.spec import BiasTerm
from implicit_attention.equation.own_scores import own_scores
from implicit_attention.equation.packing import PackedMap, Packing
from implicit_attention.equation.projection import (
    Layer,
    Projected,
    norm_weight,
    normed_keys,
    norms_input_alone,
    project,
    rotation_of,
    values,
)
from implicit_attention.equilibrium.solvers import DirectSolver
from implicit_attention.inputs import Inputs
from implicit_attention.settings import Settings


class Equation(NamedTuple):
    """The fixed-point equation that a layer solves for given inputs: `y = function(y, *args)`.

    Attributes:
        function: The map; that of packed documents is a `PackedMap`.
        args: Its tensors, differentiable in the layer's parameters and inputs.
        start: Where iterative solvers start, `[B, N, D]`: the values, or what the call gave.
    """

    function: AttentionMap | PackedMap
    args: tuple[Tensor, ...]
    start: Tensor


def prepare(layer: Layer, inputs: Inputs, projected: Projected | None = None) -> Equation:
    """Compute everything that does not depend on y.

    Args:
        layer: The layer.
        inputs: Of the call, checked.
        projected: What `project` makes of them, where it is known.

    Returns:
        The equation.
    """
    projected = project(layer, inputs) if projected is None else projected
    if inputs.packed:
        return _prepare_packed(layer, inputs, projected)
    settings, dtype = layer.settings, projected.key.dtype
    heads, groups, by_keys = settings.num_heads, settings.num_kv_heads, settings.rows_are_keys

    # Queries, keys and values.
    rotation = rotation_of(layer, inputs, inputs.x, dtype)
    tensors = _query_tensors(layer, projected, rotation)
    key = normed_keys(layer, split_heads(projected.key, heads if by_keys else groups))
    if set(tensors) == {"weight"} and _can_absorb(settings):
        key = key @ tensors.pop("weight")  # k . Omega_Q y = (Omega_Q^T k) . y: queries are y itself
    unrotated, key = key, _rotated(layer, inputs, key, rotation)
    value = split_heads(projected.value, groups)
    if settings.max_gain is not None:
        key, value, tensors["gate"] = _contract(settings, inputs, key, value, tensors)
    tensors |= {"key": key, "value": value, **_value_tensors(projected), **_past_tensors(inputs, dtype)}

    # The start, and the scores of own columns that are made from it.
    start = _first_outputs(layer, inputs, value)
    normalize = bool(settings.qk_norm) and not norms_input_alone(settings)
    query_map = QueryMap(groups if by_keys else heads, normalize, settings.query_output)
    if settings.self_query == "input":
        tensors["self_score"] = _own_scores(settings, unrotated, query_map, tensors, start)
    if inputs.start is not None:
        start = inputs.start.to(start.dtype, copy=True)  # callers write the next frame into their buffer
        tensors["start"] = start

    # Biases and dropout.
    terms = _bias_terms(layer, inputs, dtype)
    tensors |= {f"term{i}": tensor for i, (_, tensor) in enumerate(terms)}
    dropout = settings.dropout if layer.training else 0.0
    if dropout:
        tensors["seeds"] = torch.randint(2**62, inputs.x.shape[:1], device=inputs.x.device)

    spec = AttentionSpec(settings.scale, settings.is_causal, tuple(term for term, _ in terms), dropout, settings.window)
    value_map = None if projected.value_map is None else ValueMap(groups, settings.feedback_norm)
    function = AttentionMap(spec, query_map, by_keys, tuple(tensors), value_map, settings.max_gain)
    return Equation(function, tuple(tensors.values()), start)


def _prepare_packed(layer: Layer, inputs: Inputs, projected: Projected) -> Equation:
    """The equations of packed documents, batch by batch, as one."""
    # Without a causal mask documents would see the padding, and other solvers would iterate on it too.
    padded = layer.settings.is_causal and isinstance(layer.solver, DirectSolver)
    packing = Packing.of(inputs, padded=padded)
    by_token = {"key": projected.key, "value": projected.value, "added": projected.added}
    unpacked = {name: packing.unpack(t) for name, t in by_token.items() if t is not None}
    equations = []
    for i, part in enumerate(packing.unpack_inputs(inputs)):
        added = unpacked["added"][i] if "added" in unpacked else None
        own = projected._replace(key=unpacked["key"][i], value=unpacked["value"][i], added=added)
        equations.append(prepare(layer, part, own))
    function = PackedMap(packing, tuple(e.function for e in equations if isinstance(e.function, AttentionMap)))
    return Equation(function, tuple(t for e in equations for t in e.args), packing.pack(e.start for e in equations))


def _query_tensors(layer: Layer, projected: Projected, rotation: Tensor | None) -> dict[str, Tensor]:
    """The tensors of the query map, by name."""
    weight, bias = projected.query_map or (None, None)
    given = {"weight": weight, "bias": bias, "added": projected.added, "rotation": rotation}
    if not norms_input_alone(layer.settings):
        given["norm_weight"] = norm_weight(layer, projected.key.dtype)
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _can_absorb(settings: Settings) -> bool:
    """Whether keys can absorb `Omega_Q`, if queries are `Omega_Q y` and nothing else."""
    return settings.num_heads == 1 and settings.max_gain is None and not (settings.qk_norm or settings.feeds_back)


def _rotated(layer: Layer, inputs: Inputs, key: Tensor, rotation: Tensor | None) -> Tensor:
    """Keys, rotated by the positions of their own tokens, if there is a `rotation` of x."""
    if rotation is None:
        return key
    if inputs.context is not None:
        rotation = rotation_of(layer, inputs, inputs.source, key.dtype)
        assert rotation is not None
    return rotate(key, rotation)


def _contract(
    settings: Settings, inputs: Inputs, key: Tensor, value: Tensor, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the map contract by `max_gain`.

    Returns:
        Keys and values, changed only where no output of a visible token depends on it; the factor on y, `[B, 1, 1]`, or
        `[B, N, 1]` where a mask keeps documents apart, in float32 or wider.
    """
    assert settings.max_gain is not None
    hidden, starts = hidden_columns(inputs.padding), inputs.document_starts
    if hidden is not None:  # no row reads them; whatever stands there would count as the size of the values
        value = value.masked_fill(hidden[:, None, :, None], 0.0)
    if not settings.rows_are_keys:  # all scores of a row move alike: rounding of what they share would be amplified
        key = centred(key, hidden, starts)
    found = gain(
        key, value, tensors["weight"], scale=settings.scale, rows_are_keys=settings.rows_are_keys,
        rotated="rotation" in tensors, dropout=settings.dropout, hidden=hidden,
        made=tensors.get("added") if settings.rows_are_keys else None, starts=starts,
    )  # fmt: skip
    if hidden is not None and found.rows is not None:
        # Hidden tokens do not count in the bound. Where their own gain is larger, smaller keys bring it down.
        tiny = torch.finfo(found.rows.dtype).tiny
        squared = found.squared
        shrunk = (squared / torch.maximum(found.rows, squared).clamp_min(tiny)).clamp_min(tiny)
        key = key * torch.where(hidden, shrunk.sqrt(), 1.0)[:, None, :, None].to(key.dtype)
    return key, value, found.factor(settings.max_gain)[..., None]


def _value_tensors(projected: Projected) -> dict[str, Tensor]:
    """The tensors of the map from outputs to values, by name."""
    given = projected.value_map or (None, None)
    return {name: t for name, t in zip(ValueMap.names, given, strict=True) if t is not None}


def _past_tensors(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The columns of a cache, by name."""
    past = inputs.past
    return {} if past is None else {"past_column": past.column.to(dtype), "past_value": past.value.to(dtype)}


def _first_outputs(layer: Layer, inputs: Inputs, value: Tensor) -> Tensor:
    """The values of the rows' own tokens, from which iteration starts, `[B, N, D]`."""
    settings = layer.settings
    if inputs.context is not None:
        value = split_heads(values(layer, inputs.x, value.dtype), settings.num_kv_heads)
    start = merge_heads(for_heads(value, settings.num_heads))
    # torch.compile rebuilds outputs that are views of each other wrongly
    return start.clone() if torch.compiler.is_compiling() else start


def _own_scores(
    settings: Settings, key: Tensor, query_map: QueryMap, tensors: dict[str, Tensor], start: Tensor
) -> Tensor:
    """The score of each token's key, not rotated, with the query that is made from its start, `[B, H, N]`."""
    made = query_map.linear(start, *(tensors.get(name) for name in ("weight", "bias", "added")))
    weight = tensors.get("norm_weight")
    key = key if weight is None else key * weight
    return own_scores(key, made, settings.scale, normalize=query_map.normalize)


def _bias_terms(layer: Layer, inputs: Inputs, dtype: torch.dtype) -> list[tuple[BiasTerm, Tensor]]:
    """The biases of the masks and of the positions, each with its tensor."""
    terms = mask_terms(inputs.attn_mask, inputs.padding, dtype, inputs.past_length)
    bias = None if layer.positions is None else layer.positions(inputs.x)
    return terms if bias is None else [*terms, bias]
