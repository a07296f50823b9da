"""One solve of an implicit layer inside a model: with a transformers cache, and with adapters on its query map."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf.caching import LayerCache
from implicit_attention.solvers import Solution


def solve(
    layer: ImplicitQueryAttention,
    x: Tensor,
    hidden: Tensor | None = None,
    cache: LayerCache | None = None,
    *,
    need_weights: bool = False,
    gains: bool = False,
) -> tuple[Solution, Tensor | None]:
    """Return the equilibrium before `out_proj`, and the attention matrix if it is asked for.

    Args:
        layer: The layer.
        x: New tokens, `[B, n, D]`.
        hidden: `[B, n]`, True where a new token is padding; None if none is.
        cache: Holds the P tokens before, and is given the new ones.
        need_weights: Also return the attention matrix.
        gains: Measure `Solution.gain`, where the layer has it.

    Returns:
        The solution, and `[B, H, n, P + n]` or None.
    """
    call, arguments = _Solve(layer), (x, hidden, cache, need_weights, gains and layer.triangular)
    query_map: nn.Module = layer.Omega_Q
    replaced = {} if isinstance(query_map, nn.Linear) else _effective_weight(query_map)
    out: tuple[Solution, Tensor | None] = functional_call(call, replaced, arguments) if replaced else call(*arguments)
    return out


class _Solve(nn.Module):
    def __init__(self, layer: ImplicitQueryAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, hidden: Tensor | None, cache: LayerCache | None, need_weights: bool, gains: bool
    ) -> tuple[Solution, Tensor | None]:
        equation = self.layer.equation(x, key_padding_mask=hidden, cache=cache) if need_weights else None
        solution = self.layer.solve(x, key_padding_mask=hidden, cache=cache, gains=gains)
        if equation is None:
            return solution, None
        return solution, equation.function.weights(solution.value, *equation.args)


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
