"""Whether an equilibrium is stable and unique: measures, bounds, and a penalty for training."""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from implicit_attention.attention.map import AttentionMap
from implicit_attention.attention.operation import log_sum_exp
from implicit_attention.causal.diagonal import own_jacobian
from implicit_attention.causal.forward_substitution import radius
from implicit_attention.causal.system import CausalSystem
from implicit_attention.equation import Equation
from implicit_attention.equation.packing import PackedMap
from implicit_attention.equilibrium import linear
from implicit_attention.equilibrium.maps import Linearization
from implicit_attention.errors import Came, bad_value, check_positive
from implicit_attention.layer import ImplicitQueryAttention

_BLOCK_ELEMENTS = 1 << 22  # most distances in memory at once
_ROWS = 64  # rows whose biases are read together


class Inputs(TypedDict, total=False):
    """The arguments of `layer.solve` besides x.

    Attributes:
        context: Where keys and values come from, `[B, M, D]`.
        attn_mask: `[N, M]`, `[B * H, N, M]` or `[B, H, N, M]`.
        key_padding_mask: `[B, M]`.
    """

    context: Tensor | None
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None


def spectral_radius(
    layer: ImplicitQueryAttention, x: Tensor, *, iterations: int | None = None, **inputs: Unpack[Inputs]
) -> Tensor:
    r"""Return `max |eigenvalue of dF/dy|` at the equilibrium.

    Below 1, plain iteration converges to the equilibrium from nearby; where an eigenvalue is 1 the gradient
    does not exist. Exact under a causal mask, where dF/dy is block triangular: the largest gain of a row
    (`layer.solve(x, gains=True)`). Otherwise an estimate by the power iteration on `(dF/dy)^T`.

    Args:
        layer: The layer. Its own solver finds the equilibrium, and failures are reported as usual.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        iterations: Products with the Jacobian, at least 1 (50 if None); none are taken under a causal mask over
            queries.
        **inputs: The other inputs of `layer.solve`: `context`, `attn_mask`, `key_padding_mask`.

    Returns:
        One figure per independent system, in float32 or wider: `[B]`, or `[B, N]` with
        `normalize_over="keys"`.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `layer.solve`, or if the layer is in training mode with dropout, or `iterations` is below 1
            or has no effect.
        ConvergenceError: As `layer.solve`.
    """
    iterations = _power_iterations(layer, iterations)
    equation = _equation(layer, x, inputs)
    if layer.triangular:
        with torch.no_grad():
            solution = layer.solve(x if x.dim() == 3 else x[None], gains=True, **inputs)
        assert solution.gain is not None
        return solution.gain.amax(1)
    with torch.no_grad():
        y = layer.solve(x, **inputs).value.reshape(equation.start.shape)
    function, args = equation.function, equation.args
    linearization = Linearization(function, y, args, [False] * len(args))
    systems = y.shape[: function.system_ndim]
    wide = torch.promote_types(y.dtype, torch.float32)

    def product(lam: Tensor) -> Tensor:
        pulled, _ = linearization.vjp(lam.to(y.dtype).reshape(y.shape))
        return pulled.reshape(lam.shape).to(wide)

    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
    start = torch.randn(y.shape, generator=generator).to(y.device, wide).reshape(systems.numel(), -1)
    return linear.spectral_radius(product, start, iterations=iterations).reshape(systems)


def _power_iterations(layer: ImplicitQueryAttention, iterations: int | None) -> int:
    if layer.triangular and iterations is not None:
        raise bad_value("iterations", "None for a causal layer", iterations, "Its radius is exact, without iterating.")
    if iterations is not None and iterations < 1:
        raise bad_value("iterations", "an integer >= 1", iterations)
    return 50 if iterations is None else iterations


def row_gains(layer: ImplicitQueryAttention, x: Tensor, **inputs: Unpack[Inputs]) -> Tensor:
    r"""Return the gain of each row of a causal equilibrium: the spectral radius of the row's own Jacobian.

    With one head that is `|p (1 - p) beta|`. Their maximum is the spectral radius of the whole map. The same as
    `layer.solve(x, gains=True).gain`, but **differentiable** in parameters and inputs, at the price of one more
    attention pass.

    Args:
        layer: A causal layer whose rows belong to keys.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        **inputs: The other inputs of `layer.solve`.

    Returns:
        `[B, N]`, in float32 or wider.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `layer.solve`; or if the layer is not causal, or has active dropout.
        ConvergenceError: As `layer.solve`.
    """
    _refuse_dropout(layer)
    if not layer.triangular:
        raise bad_value("layer", 'one with is_causal=True and normalize_over="queries"', layer,
                        "Use spectral_radius.")  # fmt: skip
    x = x if x.dim() == 3 else x[None]
    equation, y = layer.equation(x, **inputs), layer.solve(x, **inputs).value
    return radius(own_jacobians(equation, y))


def gain_penalty(layer: ImplicitQueryAttention, x: Tensor, *, limit: float = 0.9, **inputs: Unpack[Inputs]) -> Tensor:
    """Return the mean over rows of `max(gain - limit, 0)^2`, to be added to a loss.

    It keeps a causal equilibrium away from where its gradient blows up (gain 1) and costs nothing below the limit.

    Args:
        layer: A causal layer whose rows belong to keys.
        x: Input `[B, N, D]`.
        limit: The gain above which a row is penalised.
        **inputs: The other inputs of `layer.solve`.

    Returns:
        A scalar.

    Raises:
        TypeError: As `row_gains`.
        ValueError: As `row_gains`, or if the limit is not positive.
        ConvergenceError: As `layer.solve`.
    """
    check_positive("limit", limit)
    return (row_gains(layer, x, **inputs) - limit).clamp_min(0.0).square().mean()


def own_jacobians(equation: Equation, y: Tensor) -> Tensor:
    """Return one matrix per row, whose eigenvalues are the non-zero ones of the row's own block of dF/dy.

    Args:
        equation: Of a layer whose rows belong to keys, with any mask.
        y: Its equilibrium, `[B, N, D]`.

    Returns:
        `[B, N, H, H]`, in float32 or wider, differentiable.

    Raises:
        ValueError: If the equation is that of packed documents.
    """
    system = CausalSystem(_one_map(equation), equation.args)
    y = y.to(system.wide).view(*y.shape[:2], system.heads, system.dim)
    if system.self_score is not None:
        return y.new_zeros(*y.shape[:3], system.heads)
    everything = slice(0, system.length)
    queries = system.phi(y, everything)
    query = system.per_head(queries.query.transpose(1, 2).to(system.narrow))
    lse = log_sum_exp(system.key, query, system.spec, terms=system.terms)
    lse = lse.masked_fill(torch.isneginf(lse), torch.inf)  # rows that see nothing have no weight on themselves
    own = (system.key * query).sum(-1) * system.spec.scale
    own_bias = [_own_bias(system, i) for i in range(0, system.length, _ROWS)]
    p = torch.exp(own + torch.cat(own_bias, -1) - lse)
    return own_jacobian(system, everything, y, queries, p)


def _own_bias(system: CausalSystem, first: int) -> Tensor:
    rows = slice(first, min(first + _ROWS, system.length))
    own = system.block_bias(rows)[1]
    return system.key.new_zeros(1, 1, rows.stop - first) if own is None else own


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
    function = _one_map(equation)
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
    _refuse_dropout(layer)
    with torch.no_grad():
        return layer.equation(x, **inputs)


def _one_map(equation: Equation) -> AttentionMap:
    if isinstance(equation.function, PackedMap):
        raise bad_value("segments", "None, as cu_seqlens, for this figure", Came("packed documents"),
                        "Take it document by document, or use layer.solve(..., gains=True).gain.")  # fmt: skip
    return equation.function


def _refuse_dropout(layer: ImplicitQueryAttention) -> None:
    if layer.training and layer.dropout:
        raise bad_value(
            "layer",
            "in eval mode",
            Came(f"one in training mode with dropout={layer.dropout}"),
            "Call layer.eval() first.",
        )


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
