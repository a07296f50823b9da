"""One solve of an implicit layer inside a model, with a transformers cache."""

from typing import Any, NamedTuple

from torch import Tensor

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
    given: dict[str, Any] = {"key_padding_mask": hidden, "cache": cache, "attn_mask": mask, "segments": segments}
    given = {name: value for name, value in given.items() if value is not None}
    equation = layer.equation(x, **given) if need_weights else None
    solution = layer.solve(x, **given, gains=gains and layer.triangular)
    weights = None if equation is None else equation.function.weights(solution.value, *equation.args)
    return Solved(solution.value, weights, layer_stats(solution))
