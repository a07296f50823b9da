"""Whether an equilibrium is stable and unique: measures, bounds, and a penalty for training."""

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from implicit_attention.attention.gain import gain, hidden_columns
from implicit_attention.attention.map import AttentionMap
from implicit_attention.attention.operation import log_sum_exp
from implicit_attention.causal.forward_substitution import radius
from implicit_attention.causal.own_columns import own_jacobian
from implicit_attention.causal.system import CausalSystem
from implicit_attention.equation import Equation
from implicit_attention.equation.packing import PackedMap
from implicit_attention.equilibrium import linear
from implicit_attention.equilibrium.maps import Linearization
from implicit_attention.errors import Came, bad_value, check_positive
from implicit_attention.layer import ImplicitQueryAttention

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
            gain = layer.solve(x, gains=True, **inputs).gain
        assert gain is not None
        return (gain if x.dim() == 3 else gain[None]).amax(1)
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
    drawn = torch.randn(y.shape, generator=generator, device="cpu").to(y.device, wide)
    start = drawn.flatten(len(systems)).flatten(0, len(systems) - 1)  # `reshape` refuses an empty batch
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
        came = f"is_causal={layer.is_causal}, normalize_over={layer.normalize_over!r}"
        raise bad_value("layer", 'one with is_causal=True and normalize_over="queries"', Came(came),
                        "Use spectral_radius.")  # fmt: skip
    _refuse_cache(inputs)
    equation, y = layer.equation(x, **inputs), layer.solve(x, **inputs).value
    return radius(own_jacobians(equation, y if x.dim() == 3 else y[None]))


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
    gate = system.tensors.get("gate")  # [B, 1 or N, 1]: with `max_gain`, queries read `gate * y`
    gate = None if gate is None else gate.to(system.wide)[..., None]
    queries = system.phi(y if gate is None else gate * y, everything)
    query = system.per_head(queries.query.transpose(1, 2).to(system.narrow))
    lse = log_sum_exp(system.key, query, system.spec, terms=system.terms)
    lse = lse.masked_fill(torch.isneginf(lse), torch.inf)  # rows that see nothing have no weight on themselves
    own = (system.key * query).sum(-1) * system.spec.scale
    own_bias = [_own_bias(system, i) for i in range(0, system.length, _ROWS)]
    p = torch.exp(own + torch.cat(own_bias, -1) - lse)
    found = own_jacobian(system, everything, y, queries, p)
    return found if gate is None else gate * found


def _own_bias(system: CausalSystem, first: int) -> Tensor:
    rows = slice(first, min(first + _ROWS, system.length))
    own = system.block_bias(rows)[1]
    return system.key.new_zeros(1, 1, rows.stop - first) if own is None else own


class Contraction(NamedTuple):
    """How fast the map of a layer contracts, one figure per sample, `[B]`, in float32 or wider.

    Attributes:
        bound: L, a Lipschitz constant of the map without `max_gain`.
        factor: `f = min(1, max_gain / L)`, by which `max_gain` scales what queries take from y; 1 without it. The map
            contracts by `f L`.
        radius: The spectral radius at the equilibrium, measured: the rate at which iteration ends. With
            `normalize_over="keys"` the largest of a sample's tokens.
    """

    bound: Tensor
    factor: Tensor
    radius: Tensor


def contraction(layer: ImplicitQueryAttention, x: Tensor, **inputs: Unpack[Inputs]) -> Contraction:
    """Return what is known of a layer's contraction beforehand, and what is measured at its equilibrium.

    Args:
        layer: A layer whose query map is affine in y: without `qk_norm`, or with `max_gain`.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        **inputs: The other inputs of `layer.solve`.

    Returns:
        The figures.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `contraction_bound`.
        ConvergenceError: As `layer.solve`.
    """
    bound, factor = _bound_and_factor(layer, x, inputs)
    radius = spectral_radius(layer, x, **inputs)
    return Contraction(bound, factor, radius if radius.dim() == 1 else radius.amax(1))


def contraction_bound(layer: ImplicitQueryAttention, x: Tensor, **inputs: Unpack[Inputs]) -> Tensor:
    r"""Return a Lipschitz constant of F in y: `f max_i sqrt(sum_h (scale |Omega_Q^hT k_i^h| radius(V^h))^2)`.

    Distances between outputs are measured by the token that differs most, each token in the Euclidean norm.
    Below 1, the map contracts whatever the mask: the equilibrium is unique and plain iteration reaches it
    from anywhere. At 1 or above nothing is known. With `max_gain`, f makes it at most that; else f is 1. See
    `attention/gain.py` for the derivation, and for `normalize_over="keys"`.

    Args:
        layer: A layer whose query map is affine in y: without `qk_norm`, or with `max_gain`.
        x: Input `[B, N, D]`, or `[N, D]` as a batch of one.
        **inputs: The other inputs of `layer.solve`. Hidden tokens do not count; masks do not change the bound.

    Returns:
        `[B]`, in float32 or wider.

    Raises:
        TypeError: As `layer.solve`.
        ValueError: As `layer.solve`; or if the layer has `qk_norm` without `max_gain`, `values="feedback"`, or active
            dropout.
    """
    bound, factor = _bound_and_factor(layer, x, inputs)
    return bound * factor


@torch.no_grad()
def _bound_and_factor(layer: ImplicitQueryAttention, x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    equation = _equation(layer, x, inputs)
    function = _one_map(equation)
    if inputs.get("segments") is not None:
        raise _of_documents()
    if function.value_map is not None:
        raise bad_value("layer", "one whose values read no outputs", Came('one with values="feedback"'),
                        "Its equilibrium is unique whatever the weights: there is nothing to bound.")  # fmt: skip
    tensors = dict(zip(function.names, equation.args, strict=True))
    if function.query_map.normalize:
        raise bad_value(
            "layer", "one whose queries are affine in y", Came("one with qk_norm and without max_gain"),
            "The bound does not hold there: use spectral_radius at the equilibrium.",
        )  # fmt: skip
    key = tensors["key"]
    identity = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    found = gain(
        key, tensors["value"], tensors.get("weight", identity), scale=function.spec.scale,
        rows_are_keys=function.rows_are_keys, rotated="rotation" in tensors,
        dropout=0.0 if layer.max_gain is None else layer.dropout, hidden=hidden_columns(_padding(x, inputs)),
        made=tensors.get("added") if function.rows_are_keys else None,
    )  # fmt: skip
    bound = found.squared.sqrt()
    factor = torch.ones_like(bound) if layer.max_gain is None else found.factor(layer.max_gain)
    return bound[:, 0], factor[:, 0]


def _padding(x: Tensor, inputs: Inputs) -> Tensor | None:
    padding = inputs.get("key_padding_mask")
    return padding[None] if padding is not None and padding.dim() == 1 else padding


def _equation(layer: ImplicitQueryAttention, x: Tensor, inputs: Inputs) -> Equation:
    _refuse_dropout(layer)
    _refuse_cache(inputs)
    with torch.no_grad():
        return layer.equation(x, **inputs)


def _refuse_cache(inputs: Inputs) -> None:
    """Refuse a cache: the map of all tokens is measured, and a solve would give the cache those of x."""
    if (cache := inputs.get("cache")) is not None:
        raise bad_value("cache", "None for this figure", Came(type(cache).__name__),
                        "Pass all tokens, or take layer.solve(x, cache=cache, gains=True).gain.")  # fmt: skip


def _one_map(equation: Equation) -> AttentionMap:
    if isinstance(equation.function, PackedMap):
        raise _of_documents()
    return equation.function


def _of_documents() -> ValueError:
    came = Came("packed documents")
    return bad_value("segments", "None, as cu_seqlens, for this figure", came, "Take it document by document.")


def _refuse_dropout(layer: ImplicitQueryAttention) -> None:
    if layer.training and layer.dropout:
        raise bad_value(
            "layer",
            "in eval mode",
            Came(f"one in training mode with dropout={layer.dropout}"),
            "Call layer.eval() first.",
        )
