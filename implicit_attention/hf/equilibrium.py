"""One solve of an implicit layer inside a model: with a transformers cache, and with adapters on its query map."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import Cache

from implicit_attention import ImplicitQueryAttention
from implicit_attention.solvers import Solution


def solve(
    layer: ImplicitQueryAttention,
    x: Tensor,
    hidden: Tensor | None = None,
    cache: Cache | None = None,
    layer_idx: int = 0,
    *,
    need_weights: bool = False,
) -> tuple[Solution, Tensor | None]:
    """Return the equilibrium before `out_proj`, and the attention matrix if it is asked for.

    Args:
        layer: The layer.
        x: New tokens, `[B, n, D]`.
        hidden: `[B, P + n]`, True where a token is padding; None if none is.
        cache: Holds queries and values of the P tokens before, and is given those of the new ones.
        layer_idx: Which entry of the cache is the layer's.
        need_weights: Also return the attention matrix.

    Returns:
        The solution, and `[B, H, n, P + n]` or None.
    """
    if cache is not None:
        raise NotImplementedError("Implicit blocks cannot decode from a cache yet: call with use_cache=False.")
    call = _Solve(layer)
    if isinstance(layer.Omega_Q, nn.Linear):
        return call(x, hidden, need_weights)
    name, weight = _effective_weight(layer.Omega_Q)
    out: tuple[Solution, Tensor | None] = functional_call(
        call, {f"layer.Omega_Q.{name}": weight}, (x, hidden, need_weights)
    )
    return out


class _Solve(nn.Module):
    def __init__(self, layer: ImplicitQueryAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hidden: Tensor | None, need_weights: bool) -> tuple[Solution, Tensor | None]:
        solution = self.layer.solve(x, key_padding_mask=hidden)
        if not need_weights:
            return solution, None
        equation = self.layer.equation(x, key_padding_mask=hidden)
        return solution, equation.function.weights(solution.value, *equation.args)


def _effective_weight(linear: nn.Linear) -> tuple[str, Tensor]:
    """Return the weight that an adapted linear map amounts to, under the name of the parameter in its place.

    A solve applies the query map many times and so takes its weight, not the module: what an adapter (LoRA) adds
    would be left out. The map of the unit vectors, less that of zero, is the whole of it.

    Returns:
        The parameter's name, and the weight.
    """
    base, bias = linear.weight, linear.bias
    name = next(name for name, parameter in linear.named_parameters() if parameter is base)
    out = linear(torch.eye(linear.in_features, dtype=base.dtype, device=base.device))
    return name, (out if bias is None else out - bias).mT
