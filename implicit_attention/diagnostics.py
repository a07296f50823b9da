"""Is an equilibrium stable, and is it the only one? Two figures that tell."""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from implicit_attention import linear
from implicit_attention.errors import Came, bad_value
from implicit_attention.layer import Equation, ImplicitQueryAttention
from implicit_attention.maps import Linearization

_BLOCK_ELEMENTS = 1 << 22  # distances alive at once


class Inputs(TypedDict, total=False):
    """What `layer.solve` takes next to x.

    Attributes:
        context: Where keys and values come from, `[B, M, D]`.
        attn_mask: `[N, M]`, `[B * H, N, M]` or `[B, H, N, M]`.
        key_padding_mask: `[B, M]`.
    """

    context: Tensor | None
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None


def spectral_radius(
    layer: ImplicitQueryAttention, x: Tensor, *, iterations: int = 50, **inputs: Unpack[Inputs]
) -> Tensor:
    r"""Estimate `max |eigenvalue of dF/dy|` at the equilibrium, by the power iteration on `(dF/dy)^T`.

    Below 1, plain iteration converges to the equilibrium from nearby; where an eigenvalue is 1 the gradient
    does not exist. With a causal mask the estimate needs more iterations than there are tokens: until then it
    shows how a perturbation grows along the sequence, which can be far above the radius.

    Args:
        layer: The layer; its equilibrium is solved for with its own solver, and reported as usual.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        iterations: Products with the Jacobian, at least 1.
        **inputs: The other inputs of `layer.solve`: `context`, `attn_mask`, `key_padding_mask`.

    Returns:
        One figure per independent system, in float32 or wider: `[B]`, or `[B, N]` with
        `normalize_over="keys"`.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `layer.solve`, or if the layer is in training mode with dropout, or `iterations` < 1.
        ConvergenceError: As `layer.solve`.
    """
    if iterations < 1:
        raise bad_value("iterations", "an integer >= 1", iterations)
    equation = _equation(layer, x, inputs)
    with torch.no_grad():
        y = layer.solve(x, **inputs).value.reshape(equation.start.shape)
    function, args = equation.function, equation.args
    linearization = Linearization(function, y, args, [False] * len(args))
    systems = y.shape[: function.system_ndim]
    wide = torch.promote_types(y.dtype, torch.float32)

    def product(lam: Tensor) -> Tensor:
        pulled, _ = linearization.vjp(lam.to(y.dtype).reshape(y.shape))
        return pulled.reshape(lam.shape).to(wide)

    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    start = torch.randn(y.shape, generator=generator).to(y.device, wide).reshape(systems.numel(), -1)
    return linear.spectral_radius(product, start, iterations=iterations).reshape(systems)


def contraction_bound(layer: ImplicitQueryAttention, x: Tensor, **inputs: Unpack[Inputs]) -> Tensor:
    r"""Return a Lipschitz constant of F in y: `max_i sqrt(sum_h (scale |Omega_Q^hT k_i^h| diam(V^h))^2)`.

    Distances between outputs are measured by the token that differs most, each token in the Euclidean norm.
    Below 1, the map contracts whatever the mask: the equilibrium is unique and plain iteration reaches it
    from anywhere. At 1 or above nothing is known. With `normalize_over="keys"` the maximum over i is taken in
    each head.

    Args:
        layer: A layer whose query map is affine in y: neither `qk_norm` nor rotary positions.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        **inputs: The other inputs of `layer.solve`; masks do not change the bound.

    Returns:
        `[B]`, in float32 or wider.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `layer.solve`; or if the layer has `qk_norm`, rotary positions, or active dropout.
    """
    equation = _equation(layer, x, inputs)
    function = equation.function
    tensors = dict(zip(function.names, equation.args, strict=True))
    if function.query_map.normalize or "rotation" in tensors:
        raise bad_value(
            "layer", "one whose queries are affine in y", Came("one with qk_norm or rotary positions"),
            "The bound does not hold there: use spectral_radius at the equilibrium.",
        )  # fmt: skip
    key, value = _wide(tensors["key"]), _wide(tensors["value"])  # [B, H, N, d]
    weight = tensors.get("weight")
    size = key.norm(dim=-1) if weight is None else _pulled_norm(key, _wide(weight))  # [B, H, N]
    gain = function.spec.scale * size * _diameter(value)[..., None]
    if function.rows_are_keys:
        return gain.square().sum(1).amax(-1).sqrt()
    return gain.amax(-1).square().sum(1).sqrt()


def _equation(layer: ImplicitQueryAttention, x: Tensor, inputs: Inputs) -> Equation:
    if layer.training and layer.dropout:
        raise bad_value(
            "layer",
            "in eval mode",
            Came(f"one in training mode with dropout={layer.dropout}"),
            "Call layer.eval() first.",
        )
    with torch.no_grad():
        return layer.equation(x, **inputs)


def _pulled_norm(key: Tensor, weight: Tensor) -> Tensor:
    """`|Omega_Q^hT k^h|`, `[B, H, N]`, by the Gram matrix of each head's rows of Omega_Q."""
    rows = weight.reshape(key.shape[1], -1, weight.shape[-1])  # [H, d, D]
    pulled: Tensor = key @ (rows @ rows.mT)
    return (pulled * key).sum(-1).clamp_min(0).sqrt()


def _diameter(value: Tensor) -> Tensor:
    """Largest distance between two values of a head, `[B, H]`, some rows of the distance matrix at a time."""
    batch, heads, n, _ = value.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * n))
    exact = "donot_use_mm_for_euclid_dist"  # the fast way cancels, and a bound must not come out too low
    largest = [torch.cdist(rows, value, compute_mode=exact).amax((-2, -1)) for rows in torch.split(value, step, dim=-2)]
    return torch.stack(largest).amax(0)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
