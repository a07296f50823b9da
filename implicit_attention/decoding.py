r"""One new token after a cache, in few operations: what a decode step costs is their number, not their size.

All other columns come before the token, so attention over them, `a` with log-sum-exp `l`, is computed once, and what
is left are H numbers, the weights `p` of the token on itself (`rows`): `y = a + p (v - a)`. The query is linear in p
before its norm, so the query map is applied to a and v alone, and the iteration `p <- sigmoid(score(p) - l)`
works on H numbers. From p = 1, the start `y = v`, it is Picard's; where each of its steps is at most half as long as
the one before, its limit is the root that `rows.solve_rows` returns. Any other token is left to the solver.

With Triton's kernels all that is no product of matrices and no attention is three launches (`causal/triton/token`), and
the device is looked at once a step.
"""

from functools import lru_cache
from math import inf
from operator import le
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention import AttentionSpec, chunked
from implicit_attention.attention.map import NORM_EPS, ValueMap, by_read_head, for_heads, split_heads
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.operation import stock
from implicit_attention.attention.positions import rotate_few
from implicit_attention.cache import Cache, DecodeCache, Past
from implicit_attention.causal import engines
from implicit_attention.causal.forward_substitution import ForwardSubstitution, solved_with
from implicit_attention.equation.projection import (
    Layer,
    Projected,
    norm_parameter,
    norm_weight,
    normed_keys,
    rotation_of,
)
from implicit_attention.equilibrium.maps import makes_plain_tensors
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.equilibrium.triton_available import launching_on
from implicit_attention.errors import all_finite
from implicit_attention.inputs import Inputs

_MOST_STEPS = 20


class Decoded(NamedTuple):
    """A new token of each sample, solved, and what a cache is to hold of it."""

    solution: Solution
    column: Tensor  # its query, rotated, [B, G, 1, d]
    value: Tensor  # [B, G, 1, d]
    filled: bool  # whether both stand behind the columns of the cache already

    def fill_cache(self, cache: Cache) -> None:
        """Add the token to a cache, once nothing can fail any more."""
        if self.filled and isinstance(cache, DecodeCache):
            cache.advance(1)
        else:
            cache.append(self.column.to(self.value.dtype), self.value, None)


class _Token(NamedTuple):
    """The row equation of the new token of each sample, `y = a + p (v - a)`, in float32 or wider."""

    key: Tensor  # scaled, before its rotation, [B, H, d]
    a: Tensor  # attention over the columns before, [B, H, d]
    lse: Tensor  # its log-sum-exp [B, H]
    way: Tensor  # v - a, [B, H, d]


class _Root(NamedTuple):
    """Where a token's equation is solved."""

    p: Tensor  # [B, H, 1]
    query: Tensor  # before its rotation, [B, G, 1, d]
    moved: Tensor  # by how much a further step would move p, [B, H, 1]
    steps: int


class _SolvedToken(NamedTuple):
    y: Tensor  # [B, 1, D]
    column: Tensor  # its query, rotated, [B, G, 1, d]
    residual: Tensor  # [B, 1]
    relative: Tensor  # over the size of y, [B, 1]
    steps: int


def decode(layer: Layer, inputs: Inputs, projected: Projected) -> Decoded | None:
    """Return the equilibrium of one new token per sample; None if it needs the solver. The cache stays as it is.

    Args:
        layer: The layer.
        inputs: New tokens `[B, 1, D]`, none of them padding, and the cache with the tokens before; `serves` them.
        projected: What the linear maps make of them.

    Returns:
        The solution with what `Decoded.fill_cache` adds to the cache, or None.
    """
    past, cache, settings = inputs.past, inputs.cache, layer.settings
    assert past is not None
    assert isinstance(layer.solver, ForwardSubstitution)
    rotation = rotation_of(layer, inputs, inputs.x, projected.key.dtype)
    key, value = projected.key, split_heads(projected.value, settings.num_kv_heads)
    past = past._replace(column=_cast(past.column, key.dtype), value=_cast(past.value, key.dtype))
    fits = settings.self_query == "output" and layer.query_norm is None
    kernels = engines.token_kernels(layer.solver.kernel, key, settings.num_heads, solved_with) if fits else None
    if kernels is not None:
        slot = cache.ahead(1) if isinstance(cache, DecodeCache) and cache.column.dtype == key.dtype else None
        with launching_on(key.device):
            token, within = _solve_by_kernels(kernels, layer, projected, value, past, rotation, slot)
            solution = _solution(token, key)
            if not all(within.tolist()):  # looked at last, when next to nothing else is left to do
                return None
        return Decoded(solution, token.column, value, filled=slot is not None)
    solve = _solve_explicitly if settings.self_query == "input" else _solve_in_torch
    found = solve(layer, projected, value, past, rotation)
    if found is None:
        return None
    if projected.value_map is not None:
        read = ValueMap(settings.num_kv_heads, settings.feedback_norm)
        value = value + read(found.y.to(value.dtype), *projected.value_map)
        if not all_finite(value):
            return None
    return Decoded(_solution(found, key), found.column, value, filled=False)


def _solution(token: _SolvedToken, like: Tensor) -> Solution:
    batch, device = len(like), like.device
    trace = token.residual[None]
    return Solution(
        value=_cast(token.y, like.dtype),
        residual=token.residual,
        steps=torch.full((batch, 1), token.steps, device=device),
        converged=torch.ones(batch, 1, dtype=torch.bool, device=device),
        abs_trace=trace,
        rel_trace=trace if token.relative is token.residual else token.relative[None],
        evaluations=token.steps,
    )


def serves(layer: Layer, inputs: Inputs) -> bool:
    """Return whether `decode` has a way for this layer and call.

    Args:
        layer: The layer.
        inputs: Of the call.
    """
    settings = layer.settings
    # The solver puts Omega_Q into the keys.
    absorbed = settings.num_heads == 1 and not (settings.qk_norm or settings.feeds_back)
    return (
        inputs.batched
        and inputs.past is not None
        and inputs.cache is not None
        and inputs.x.shape[1] == 1
        and inputs.attn_mask is None
        and inputs.key_padding_mask is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # it looks at numbers
        and not (layer.training and settings.dropout)
        and settings.triangular
        and settings.window != 1
        and isinstance(layer.solver, ForwardSubstitution)
        and not absorbed
        and (layer.positions is None or layer.positions.bias() is None)
    )


def _solve_by_kernels(
    kernels: Any, layer: Layer, projected: Projected, value: Tensor, past: Past, rotation: Tensor | None,
    slot: tuple[Tensor, Tensor] | None,
) -> tuple[_SolvedToken, Tensor]:  # fmt: skip
    """Solve by Triton's kernels, which fill the `slot` of a cache; also whether samples are within tolerance: not 0."""
    assert projected.query_map is not None
    made, (weight, bias) = projected.key, projected.query_map
    temperature = norm_parameter(layer, "temperature")
    temperature = None if temperature is None else temperature.to(made.dtype)
    key, scaled = kernels.keys(
        made.view(*made.shape[:2], layer.settings.num_heads, -1), temperature, rotation, layer.settings.scale, NORM_EPS
    )
    a, lse = _attend_before(layer, key, past)
    a, lse = a.reshape(key.shape), lse.reshape(key.shape[:-1])
    fixed = None if bias is None else bias[None]
    fixed = fixed if projected.added is None else projected.added[:, 0]
    by_head = by_read_head(weight, layer.settings.num_heads)
    y, column, judged = kernels.solve_token(
        scaled, a[:, :, 0], lse[..., 0].to(scaled.dtype), value[:, :, 0], by_head, fixed, rotation,
        NORM_EPS if layer.settings.qk_norm else None, layer.solver.tolerances(made.dtype), made.dtype, slot,
    )  # fmt: skip
    return _SolvedToken(y, column, judged[0, :, None], judged[1, :, None], 1), judged[2]


def _solve_explicitly(
    layer: Layer, projected: Projected, value: Tensor, past: Past, rotation: Tensor | None
) -> _SolvedToken | None:
    """Compute y with `self_query="input"`: the own score is that of the start, and nothing is left to be solved."""
    heads, dim = layer.settings.num_heads, layer.settings.head_dim
    key = normed_keys(layer, split_heads(projected.key, heads))
    a, lse = _attend_before(layer, key if rotation is None else rotate_few(key, rotation), past)
    wide, batch, by_group = lse.dtype, len(value), (value.shape[0] * value.shape[1], -1, dim)
    weight = norm_weight(layer, wide)
    key = key if weight is None else key * weight
    a = _cast(a, wide).reshape(by_group)
    start = _cast(value, wide).reshape(by_group).expand_as(a)
    query = _cast(_query(layer, projected, start.reshape(batch, -1)), wide).view(-1, dim, 1)
    # A group's heads are rows of one product.
    lse, key = lse.reshape(a.shape[0], -1, 1), _cast(key, wide).reshape(by_group)
    with torch.autocast(a.device.type, enabled=False):  # scores and their sums stay as wide as they are
        own = torch.baddbmm(lse, key, query, beta=-1, alpha=layer.settings.scale)  # own score - lse
    y = torch.addcmul(a, own.sigmoid_(), start - a).view(batch, -1)
    if not all_finite(y.square() if layer.settings.feeds_back and layer.settings.feedback_norm else y):
        return None
    column = _column(layer, _query(layer, projected, y), rotation)
    zero = y.new_zeros(batch, 1)
    return _SolvedToken(y[:, None], column, zero, zero, 1)


def _solve_in_torch(
    layer: Layer, projected: Projected, value: Tensor, past: Past, rotation: Tensor | None
) -> _SolvedToken | None:
    """Solve the row equation in torch's operations."""
    token = _prepare_token(layer, projected.key, value, past, rotation)
    rtol, atol = layer.solver.tolerances(projected.key.dtype)
    root = _iterate(layer, projected, token, rtol, atol)
    if root is None:
        return None
    y = torch.addcmul(token.a, root.p, token.way).flatten(1)[:, None]
    measured = [y.abs().amax((1, 2)), (root.moved * token.way).abs_().amax((1, 2))]
    sizes, residuals = torch.stack(measured).tolist()  # one look at the device
    # Written so that NaN is not within tolerance: the solver will say what is wrong.
    if not all(r <= rtol * size + atol < inf for r, size in zip(residuals, sizes, strict=True)):
        return None
    column = _column(layer, root.query, rotation)
    tiny = torch.finfo(y.dtype).tiny
    relative = [r / max(size, tiny) for r, size in zip(residuals, sizes, strict=True)]
    residual, ratio = torch.tensor([residuals, relative], dtype=y.dtype, device=y.device)[..., None]  # each [B, 1]
    return _SolvedToken(y, column, residual, ratio, root.steps)


def _prepare_token(layer: Layer, made: Tensor, value: Tensor, past: Past, rotation: Tensor | None) -> _Token:
    """Attend to the columns before, and make the token's row equation from `W_K x`, `made`."""
    heads, key = layer.settings.num_heads, split_heads(made, layer.settings.num_heads)
    wide = torch.promote_types(key.dtype, torch.float32)
    key = normed_keys(layer, key)
    a, lse = _attend_before(layer, key if rotation is None else rotate_few(key, rotation), past)
    a, lse = a.reshape(key.shape), lse.reshape(key.shape[:-1])
    weight = norm_weight(layer, wide)
    key = key if weight is None else key * weight  # of queries, seen from the key: they are normed alone here
    a = a[:, :, 0].to(wide)
    way = for_heads(value[:, :, 0], heads).to(wide) - a
    return _Token(key[:, :, 0].to(wide) * layer.settings.scale, a, lse[..., 0], way)


def _attend_before(layer: Layer, key: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """Attend the new rows `[B, H, 1, d]` to the columns before: `[B, G, H / G, d]`, and its log-sum-exp."""
    settings = layer.settings
    column, value, hidden = past.column, past.value, past.hidden
    if settings.window is not None:
        first = max(0, column.shape[2] + 1 - settings.window)
        column, value = column[:, :, first:], value[:, :, first:]
        hidden = None if hidden is None else hidden[:, first:]
    spec = AttentionSpec(settings.scale)
    terms: tuple[Tensor, ...] = ()
    query = key.reshape(key.shape[0], column.shape[1], -1, key.shape[-1])  # the heads of a group as more rows
    if hidden is not None:
        spec, terms = AttentionSpec(settings.scale, terms=(AdditiveMask(),)), (hidden[:, None, None, :],)
    kernel, inputs = stock(query, value, spec), (query, column, value, None, *terms)
    return chunked.forward(spec, None, inputs) if kernel is None else kernel.forward(spec, inputs)


def _query(layer: Layer, projected: Projected, y: Tensor) -> Tensor:
    """The queries made from outputs `[B, H d]`, before their rotation and the weights of the norm, `[B, G, 1, d]`."""
    made = None if projected.added is None else projected.added[:, 0]
    if projected.query_map is not None:
        weight, bias = projected.query_map
        read = _cast(y, weight.dtype)
        made = F.linear(read, weight, bias) if made is None else torch.addmm(made, read, weight.mT)
    assert made is not None
    made = made.view(len(y), layer.settings.num_kv_heads, 1, layer.settings.head_dim)
    return _rms_norm(made.to(torch.promote_types(made.dtype, torch.float32))) if layer.settings.qk_norm else made


def _column(layer: Layer, query: Tensor, rotation: Tensor | None) -> Tensor:
    """What stands for a token in the scores of later ones: its query, times the weights of the norm, rotated."""
    weight = norm_weight(layer, query.dtype)
    query = query if weight is None else query * weight
    return query if rotation is None else rotate_few(query, rotation)


def _iterate(layer: Layer, projected: Projected, token: _Token, rtol: float, atol: float) -> _Root | None:
    """Iterate `p <- sigmoid(score(p) - lse)` from p = 1 to within tolerance; None where steps do not halve."""
    # With e = (1, p) the query before its norm is Q e. So a head's score before the norm is (Q^T k) . e, and the mean
    # square of a query is e . (Q^T Q / d) e. `forms` holds both: an iteration is one or two products with e.
    batch, heads, dim = token.a.shape
    groups = layer.settings.num_kv_heads
    by_group = (batch, groups, heads // groups)
    query = _query_in_p(projected, token)  # Q^T, [B G, 1 + H, d]
    forms = torch.bmm(token.key.view(batch * groups, -1, dim), query.mT).view(batch, heads, 1 + heads)
    if layer.settings.qk_norm:
        eps = (_eps_form if makes_plain_tensors(query) else _eps_form.__wrapped__)(1 + heads, query.dtype, query.device)
        square = torch.baddbmm(eps, query, query.mT, alpha=1 / dim)
        forms = torch.cat([forms, square.view(batch, -1, 1 + heads)], 1)
    allowed = rtol * token.a.abs().amax((1, 2)) + atol  # of y, judged by a; `_solve_in_torch` looks again
    limits = (allowed / token.way.abs().amax((1, 2))).tolist()  # of p
    e, minus_lse, inverse = token.lse.new_ones(batch, 1 + heads, 1), -token.lse, None
    p, halves = e[:, 1:, 0], [inf] * batch
    for step in range(1, _MOST_STEPS + 1):
        products = torch.bmm(forms, e)
        score = products[:, :heads, 0]
        if layer.settings.qk_norm:
            inverse = torch.bmm(products[:, heads:].view(batch, groups, 1 + heads), e).rsqrt_()  # [B, G, 1]
            offset = torch.addcmul(minus_lse.view(by_group), score.reshape(by_group), inverse)
            new = offset.sigmoid_().view(batch, heads)
        else:
            new = torch.sigmoid(score + minus_lse)
        moved = (new - p).abs_()
        lengths = moved.amax(-1).tolist()
        if all(map(le, lengths, limits)):
            q = torch.bmm(e.mT.expand(batch, groups, -1).reshape(batch * groups, 1, -1), query)
            q = q.view(batch, groups, 1, dim)
            return _Root(e[:, 1:], q if inverse is None else q * inverse[..., None], moved[..., None], step)
        if step > 2 and not all(map(le, lengths, map(max, halves, limits))):
            return None
        halves = [length / 2 for length in lengths]
        p.copy_(new)
    return None


def _query_in_p(projected: Projected, token: _Token) -> Tensor:
    """The query before its norm as a linear map of `(1, p)`: `[B G, 1 + H, d]`."""
    assert projected.query_map is not None
    batch, heads, dim = token.a.shape
    weight, bias = projected.query_map
    by_head = by_read_head(weight, heads)
    ends = torch.cat([token.a, token.way]).to(weight.dtype).transpose(0, 1)  # [H, 2 B, d]
    made = torch.bmm(ends, by_head).to(token.a.dtype).view(heads, 2, batch, -1, dim)
    base = made[:, 0].sum(0, keepdim=True)  # [1, B, G, d]
    if bias is not None:
        base = base + bias.view(-1, dim)
    if projected.added is not None:
        base = base + projected.added.view(batch, -1, dim)
    return torch.cat([base, made[:, 1]]).permute(1, 2, 0, 3).reshape(-1, 1 + heads, dim)


@lru_cache(maxsize=8)
def _eps_form(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The norm's eps as a form in `(1, p)`: in the entry of `1 * 1`, `[1, size, size]`."""
    eps = torch.zeros(1, size, size, dtype=dtype, device=device)
    eps[0, 0, 0] = NORM_EPS
    return eps


def _rms_norm(t: Tensor) -> Tensor:
    """`attention.map.rms_norm` of what is wide, in fewer operations."""
    return t * (t * t).mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype. A step is made of small operations, and `to` is one even where it does nothing."""
    return t if t.dtype is dtype else t.to(dtype)
