"""One solve of an implicit layer inside a model: with a transformers cache, and with adapters on its query map."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf.caching import LayerCache
from implicit_attention.hf.outputs import Stats, layer_stats


class Solved(NamedTuple):
    """What a block needs of a solve.

    Attributes:
        value: The equilibrium before `out_proj`, `[B, n, D]`.
        weights: The attention matrix `[B, H, n, P + n]`, if it was asked for.
        stats: The layer's part of `SolverStats`.
    """

    value: Tensor
    weights: Tensor | None
    stats: Stats


def solve(
    layer: ImplicitQueryAttention,
    x: Tensor,
    hidden: Tensor | None = None,
    cache: LayerCache | None = None,
    *,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    need_weights: bool = False,
    gains: bool = False,
) -> Solved:
    """Return the equilibrium.

    Args:
        layer: The layer.
        x: New tokens, `[B, n, D]`.
        hidden: `[B, n]`, True where a new token is padding; None if none is.
        cache: Holds the P tokens before, and is given the new ones.
        mask: The layer's `attn_mask`, `[B, H, n, P + n]`.
        segments: Which document each token belongs to, `[B, n]`.
        need_weights: Also return the attention matrix.
        gains: Measure gains, where the layer has them.

    Returns:
        The equilibrium, with what was asked for.
    """
    query_map: nn.Module = layer.Omega_Q
    given = {"key_padding_mask": hidden, "cache": cache, "attn_mask": mask, "segments": segments}
    given = {name: value for name, value in given.items() if value is not None}
    arguments = (x, given, need_weights, gains and layer.triangular)
    if isinstance(query_map, nn.Linear):
        return _solve(layer, *arguments)
    out: Solved = functional_call(_Solve(layer), _effective_weight(query_map), arguments)
    return out


def _solve(
    layer: ImplicitQueryAttention,
    x: Tensor,
    given: dict[str, Any],
    need_weights: bool,
    gains: bool,
) -> Solved:
    equation = layer.equation(x, **given) if need_weights else None
    solution = layer.solve(x, **given, gains=gains)
    weights = None if equation is None else equation.function.weights(solution.value, *equation.args)
    return Solved(solution.value, weights, layer_stats(solution))


class _Solve(nn.Module):
    """`_solve` as a module, so that a parameter of its layer can be replaced."""

    def __init__(self, layer: ImplicitQueryAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any) -> Solved:
        return _solve(self.layer, *arguments)


def _effective_weight(linear: Any) -> dict[str, Tensor]:
    """Return the weight that an adapted linear map amounts to, under the name of the parameter in its place.

    A solve applies the query map many times and so takes its weight, not the module: what an adapter (LoRA) adds
    would be left out. The map of the unit vectors, less that of zero, is the whole of it.

    Returns:
        The weight, by the parameter's name in `_Solve`.
    """
    base, bias = linear.weight, linear.bias
    name = next(name for name, parameter in linear.named_parameters() if parameter is base)
    out = linear(torch.eye(linear.in_features, dtype=base.dtype, device=base.device))
    return {f"layer.Omega_Q.{name}": (out if bias is None else out - bias).mT}
