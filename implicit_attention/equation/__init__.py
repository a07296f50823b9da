"""From a layer and the inputs of a call to the equation that is solved: everything that does not depend on y."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.gain import centred, gain, hidden_columns
from implicit_attention.attention.linear_map import LinearMap, linear_map
from implicit_attention.attention.map import AttentionMap, QueryMap, ValueMap, merge_heads, rms_norm, split_heads
from implicit_attention.attention.masks import mask_terms
from implicit_attention.attention.positions import Positions, rotate
from implicit_attention.attention.spec import BiasTerm
from implicit_attention.equation.key_norm import normed_by_head
from implicit_attention.equation.own_scores import own_scores
from implicit_attention.equation.packing import PackedMap, Packing
from implicit_attention.equilibrium.solvers import DirectSolver, Method
from implicit_attention.errors import FITTING, OTHER_OPTIONS, Came, bad_value
from implicit_attention.inputs import Inputs
from implicit_attention.settings import Settings


class Layer(Protocol):
    """What the equation is made from: settings and modules of `ImplicitQueryAttention`, under its names."""

    settings: Settings
    training: bool
    Omega_Q: nn.Linear | None  # this and the others: or what a user put in its place
    W_K: nn.Linear
    Psi_V: nn.Linear | None
    Omega_V: nn.Linear | None
    W_Q: nn.Linear | None
    temperature: nn.Parameter | None
    key_norm: nn.Parameter | None
    query_norm: nn.Parameter | None
    positions: Positions | None
    solver: Method


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


class Projected(NamedTuple):
    """What a layer's linear maps make of a call: each is called once, whoever solves it, as its hooks expect.

    Attributes:
        key: `W_K` of the tokens that keys are made from, `[B, M, H d]`; its dtype is that of the solve.
        value: Their values, `[B, M, G d]`.
        added: `W_Q x`, `[B, N, G d]`; None without it.
        query_map: What `Omega_Q` amounts to; its bias is part of `added` where there is one. None without it.
        value_map: What `Psi_V` amounts to; None without it.
    """

    key: Tensor
    value: Tensor
    added: Tensor | None
    query_map: LinearMap | None
    value_map: LinearMap | None = None


def project(layer: Layer, inputs: Inputs) -> Projected:
    """Call the linear maps of a layer.

    Args:
        layer: The layer.
        inputs: Of the call, checked.

    Returns:
        What they make of the tokens.

    Raises:
        ValueError: If what stands in the place of a map does not fit the layer's settings.
    """
    key = _made(layer, "W_K", inputs.source)
    assert key is not None
    value = values(layer, inputs.source, key.dtype)
    query_map = _read(layer, "Omega_Q", inputs, key)
    added = _made(layer, "W_Q", inputs.x)
    added = None if added is None else added.to(key.dtype)
    if added is not None and _norm_apart(layer.settings):
        normed = rms_norm(split_heads(added, added.shape[-1] // layer.settings.head_dim))
        weight = norm_weight(layer, added.dtype)
        added = merge_heads(normed if weight is None else normed * weight)
    if added is not None and query_map is not None and query_map.bias is not None:
        added, query_map = added + query_map.bias, LinearMap(query_map.weight, None)
    return Projected(key, value, added, query_map, _read(layer, "Psi_V", inputs, key))


def _read(layer: Layer, name: str, inputs: Inputs, like: Tensor) -> LinearMap | None:
    """What a map of the outputs amounts to, in the dtype of the solve."""
    module, settings = _in_place(layer, name), layer.settings
    if module is None:
        return None
    weight, bias = linear_map(module, name, inputs.x, settings.inner_dim)
    shape = (settings.widths[name], settings.inner_dim)
    if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):  # kernels take bare pointers
        came = f"a weight of shape {tuple(weight.shape)}"
        came += "" if bias is None else f" and a bias of shape {tuple(bias.shape)}"
        raise bad_value(name, f"a map with a weight of shape {shape}", Came(came), FITTING)
    return LinearMap(weight.to(like.dtype), None if bias is None else bias.to(like.dtype))


def _made(layer: Layer, name: str, tokens: Tensor) -> Tensor | None:
    """What a map makes of tokens; None if the layer has no such map."""
    module = _in_place(layer, name)
    if module is None:
        return None
    made: Tensor = module(tokens)
    width = layer.settings.widths[name]
    if made.shape[-1] != width:
        raise bad_value(name, f"a map to {width} features", Came(f"one to {made.shape[-1]}"), FITTING)
    return made


def _in_place(layer: Layer, name: str) -> nn.Module | None:
    """The module of a map; there is one if the settings ask for it."""
    module: nn.Module | None = getattr(layer, name)
    wanted = name in layer.settings.widths
    if (module is not None) != wanted:
        expected = "a module, as the layer's settings ask for it" if wanted else "None, as the layer's settings say"
        raise bad_value(name, expected, module, OTHER_OPTIONS)
    return module


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
    rotation = rotation_of(layer, inputs, inputs.x, dtype)
    tensors = _query_tensors(layer, projected, rotation)
    unrotated = normed_keys(layer, split_heads(projected.key, heads if by_keys else groups))
    key, value = unrotated, split_heads(projected.value, groups)
    if rotation is not None:
        of_keys = rotation if inputs.context is None else rotation_of(layer, inputs, inputs.source, dtype)
        assert of_keys is not None
        key = rotate(key, of_keys)
    if settings.max_gain is not None:
        key, value, tensors["gate"] = _contracting(settings, inputs, key, value, tensors)
    absorbed = set(tensors) == {"weight"} and heads == 1 and not (settings.qk_norm or settings.feeds_back)
    if absorbed:
        key = key @ tensors.pop("weight")  # k . Omega_Q y = (Omega_Q^T k) . y: queries are y itself
    tensors |= {"key": key, "value": value, **_value_tensors(projected), **_past_tensors(inputs, dtype)}
    start = _first_outputs(layer, inputs, value)
    query_map = QueryMap(groups if by_keys else heads, _norms_queries(settings), settings.query_output)
    if settings.self_query == "input":
        tensors["self_score"] = _own_scores(settings, key if absorbed else unrotated, query_map, tensors, start)
    if inputs.start is not None:
        start = inputs.start.to(start.dtype, copy=True)  # callers write the next frame into their buffer
        tensors["start"] = start
    terms = _terms(layer, inputs, dtype)
    tensors |= {f"term{i}": tensor for i, (_, tensor) in enumerate(terms)}
    dropout = settings.dropout if layer.training else 0.0
    if dropout:
        tensors["seeds"] = torch.randint(2**62, inputs.x.shape[:1], device=inputs.x.device)
    spec = AttentionSpec(settings.scale, settings.is_causal, tuple(term for term, _ in terms), dropout, settings.window)
    value_map = None if projected.value_map is None else ValueMap(groups, settings.feedback_norm)
    function = AttentionMap(spec, query_map, by_keys, tuple(tensors), value_map, settings.max_gain)
    return Equation(function, tuple(tensors.values()), start)


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
    groups = layer.settings.num_kv_heads
    own = value if inputs.context is None else split_heads(values(layer, inputs.x, value.dtype), groups)
    start = merge_heads(_repeated(own, layer.settings.num_heads // groups))
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


def _norms_queries(settings: Settings) -> bool:
    """Whether whole queries are normed, with what y makes of them."""
    return bool(settings.qk_norm) and not _norm_apart(settings)


def _norm_apart(settings: Settings) -> bool:
    """Whether the norm of queries is that of `W_Q x` alone: a norm of what y makes has no bound that helps."""
    return bool(settings.qk_norm) and settings.max_gain is not None


def _contracting(
    settings: Settings, inputs: Inputs, key: Tensor, value: Tensor, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the factor on y with which the map contracts by `max_gain`, float32 or wider.

    Returns:
        Keys and values as they were; the factor, `[B, 1, 1]`, or `[B, N, 1]` where a mask keeps documents apart.
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


def normed_keys(layer: Layer, key: Tensor) -> Tensor:
    """Return keys `[B, H, M, d]`, normed where the layer norms them, before their rotation."""
    temperature = norm_parameter(layer, "temperature")
    if temperature is not None:
        return normed_by_head(key, temperature)
    weight = norm_parameter(layer, "key_norm")
    return key if weight is None else rms_norm(key) * weight.to(key.dtype)


def norm_weight(layer: Layer, dtype: torch.dtype) -> Tensor | None:
    """Return what multiplies normed queries, `[d]`; None without it."""
    weight = norm_parameter(layer, "query_norm")
    return None if weight is None else weight.to(dtype)


def norm_parameter(layer: Layer, name: str) -> Tensor | None:
    """Return a parameter of the norms of queries and keys; None if the settings ask for none of that name.

    Args:
        layer: The layer.
        name: In `Settings.norms`, or of one that the layer could have.

    Raises:
        ValueError: If what the layer has is not what its settings ask for.
    """
    parameter: Tensor | None = getattr(layer, name)
    size = layer.settings.norms.get(name)
    if (None if parameter is None else parameter.shape) != (None if size is None else (size,)):  # kernels take pointers
        expected = "None, as the layer's settings say" if size is None else f"of shape ({size},)"
        raise bad_value(name, expected, parameter, OTHER_OPTIONS if size is None or parameter is None else FITTING)
    return parameter


def values(layer: Layer, source: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of some tokens, `[B, M, G d]`, in a dtype."""
    made = _made(layer, "Omega_V", source)
    return (source if made is None else made).to(dtype)


def _repeated(t: Tensor, times: int) -> Tensor:
    """Each group's part for its heads; no copy if each head has its own."""
    return t if times == 1 else t.repeat_interleave(times, 1)


def _query_tensors(layer: Layer, projected: Projected, rotation: Tensor | None) -> dict[str, Tensor]:
    """The tensors of phi, by name."""
    weight, bias = projected.query_map or (None, None)
    given = {"weight": weight, "bias": bias, "added": projected.added, "rotation": rotation}
    if not _norm_apart(layer.settings):
        given["norm_weight"] = norm_weight(layer, projected.key.dtype)
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def rotation_of(layer: Layer, inputs: Inputs, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the rotation of tokens of a call in a dtype, as in `Positions.rotation`; None without one.

    Args:
        layer: The layer.
        inputs: Of the call.
        tokens: Its `x`, or what keys are made from.
        dtype: Of the rotation.

    Raises:
        ValueError: If it does not fit the tokens.
    """
    if layer.positions is None:
        return None
    batch, length, dim = tokens.shape[0], tokens.shape[-2], layer.settings.head_dim
    rotation = layer.positions.rotation(length, tokens.to(dtype), inputs.position)
    if rotation is None:
        return None
    fits = rotation.shape[-2] == length and 2 * rotation.shape[-1] == dim
    if not fits or (rotation.dim() > 3 and rotation.shape[1] not in (1, batch)):
        raise bad_value("positions", f"made for {length} tokens and heads of size {dim}",
                        Came(f"rotations of shape {tuple(rotation.shape)}"), FITTING)  # fmt: skip
    return rotation


def _terms(layer: Layer, inputs: Inputs, dtype: torch.dtype) -> list[tuple[BiasTerm, Tensor]]:
    terms = mask_terms(inputs.attn_mask, inputs.padding, dtype, inputs.past_length)
    bias = None if layer.positions is None else layer.positions(inputs.x)
    return terms if bias is None else [*terms, bias]
