"""What a layer's modules make of the tokens of a call: linear maps, norms of keys and queries, rotations."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_attention.attention.linear_map import LinearMap, linear_map
from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.attention.positions import Positions
from implicit_attention.equation.key_norm import normed_by_head
from implicit_attention.equilibrium.solvers import Method
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
    key = _applied(layer, "W_K", inputs.source)
    assert key is not None
    value = values(layer, inputs.source, key.dtype)
    query_map = _matrix(layer, "Omega_Q", inputs.x, key.dtype)
    added = _query_input(layer, inputs.x, key.dtype)
    if added is not None and query_map is not None and query_map.bias is not None:
        added, query_map = added + query_map.bias, LinearMap(query_map.weight, None)
    return Projected(key, value, added, query_map, _matrix(layer, "Psi_V", inputs.x, key.dtype))


def values(layer: Layer, source: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of some tokens, `[B, M, G d]`, in a dtype."""
    made = _applied(layer, "Omega_V", source)
    return (source if made is None else made).to(dtype)


def _query_input(layer: Layer, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`W_Q x`, `[B, N, G d]`, normed if the norm of queries is that of `W_Q x` alone; None without `W_Q`."""
    added = _applied(layer, "W_Q", tokens)
    if added is None:
        return None
    added = added.to(dtype)
    if not norms_input_alone(layer.settings):
        return added
    normed = rms_norm(split_heads(added, added.shape[-1] // layer.settings.head_dim))
    weight = norm_weight(layer, dtype)
    return merge_heads(normed if weight is None else normed * weight)


def norms_input_alone(settings: Settings) -> bool:
    """Return whether the norm of queries is that of `W_Q x`: a norm of what y makes has no bound that helps."""
    return bool(settings.qk_norm) and settings.max_gain is not None


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


def _applied(layer: Layer, name: str, tokens: Tensor) -> Tensor | None:
    """What a map makes of tokens; None if the layer has no such map."""
    module = _module(layer, name)
    if module is None:
        return None
    made: Tensor = module(tokens)
    width = layer.settings.widths[name]
    if made.shape[-1] != width:
        raise bad_value(name, f"a map to {width} features", Came(f"one to {made.shape[-1]}"), FITTING)
    return made


def _matrix(layer: Layer, name: str, like: Tensor, dtype: torch.dtype) -> LinearMap | None:
    """The matrix and bias that a map of the outputs, like `like`, amounts to; None if the layer has no such map."""
    module, settings = _module(layer, name), layer.settings
    if module is None:
        return None
    weight, bias = linear_map(module, name, like, settings.inner_dim)
    shape = (settings.widths[name], settings.inner_dim)
    if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):  # kernels take bare pointers
        came = f"a weight of shape {tuple(weight.shape)}"
        came += "" if bias is None else f" and a bias of shape {tuple(bias.shape)}"
        raise bad_value(name, f"a map with a weight of shape {shape}", Came(came), FITTING)
    return LinearMap(weight.to(dtype), None if bias is None else bias.to(dtype))


def _module(layer: Layer, name: str) -> nn.Module | None:
    """The module of a map; there is one if the settings ask for it."""
    module: nn.Module | None = getattr(layer, name)
    wanted = name in layer.settings.widths
    if (module is not None) != wanted:
        expected = "a module, as the layer's settings ask for it" if wanted else "None, as the layer's settings say"
        raise bad_value(name, expected, module, OTHER_OPTIONS)
    return module
