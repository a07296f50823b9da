"""Scores of tokens with queries that are made from their own start, in few passes over memory.

`made` is what the query map makes of a token's values before its norm, and `r = 1 / sqrt(mean(made^2) + eps)`. The
score is `s = scale r (k . made)`. Its gradient needs no sum over features that the score has not taken already:

    ds/dk = scale r made      ds/dmade = scale r k - r^2 (s / d) made
"""

from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.map import NORM_EPS
from implicit_attention.equation.key_norm import plain_operations
from implicit_attention.equilibrium import maps


def own_scores(key: Tensor, made: Tensor, scale: float, *, normalize: bool) -> Tensor:
    """Return the score of each token's key with its own query.

    A rotary position turns both alike, so neither key nor query has to be rotated.

    Args:
        key: `[B, H, N, d]`, not rotated, times the weights of the queries' norm if there are any.
        made: Queries before their norm, `[B, N, G d]`.
        scale: Factor on the scores.
        normalize: Whether queries get an RMS norm.

    Returns:
        The scores, `[B, H, N]`.
    """
    made = made.reshape(*made.shape[:-1], made.shape[-1] // key.shape[-1], key.shape[-1])
    if plain_operations():
        return _scores(key, made, scale, normalize)[0].to(key.dtype)
    found: Tensor = _OwnScores.apply(key, made, scale, normalize)  # type: ignore[no-untyped-call]
    return found


def _scores(key: Tensor, made: Tensor, scale: float, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The scores, `[B, H, N]`, and the factor of the norm, `[B, N, G, 1]`, in float32 or wider."""
    wide = torch.promote_types(key.dtype, torch.float32)
    grouped, made = _grouped(key, made).to(wide), made.to(wide)
    score = (grouped * made[..., None, :]).sum(-1)  # [B, N, G, H / G]
    inverse = None
    if normalize:
        inverse = (made.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        score = score * inverse
    return (score * scale).flatten(2).transpose(1, 2), inverse


def _grouped(t: Tensor, made: Tensor) -> Tensor:
    """`[B, H, N, ...] -> [B, N, G, H / G, ...]`."""
    t = t.transpose(1, 2)
    return t.view(*t.shape[:2], made.shape[2], t.shape[2] // made.shape[2], *t.shape[3:])


class _OwnScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, made: Tensor, scale: float, normalize: bool) -> Tensor:
        score, inverse = _scores(key, made, scale, normalize)
        ctx.scale, ctx.normalize = scale, normalize
        ctx.save_for_backward(key, made, score, inverse)
        return score.to(key.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, made, score, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or maps.transforms_active():  # to be differentiated again
            needed = ctx.needs_input_grad[:2]
            with torch.enable_grad():
                score = _scores(key, made, ctx.scale, ctx.normalize)[0].to(key.dtype)
                given = [t for t, need in zip((key, made), needed, strict=True) if need]
                found = iter(torch.autograd.grad(score, given, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None
        wide = score.dtype
        slope = _grouped(grad.to(wide), made) * ctx.scale  # [B, N, G, H / G]
        slope = slope if inverse is None else slope * inverse
        d_made = (slope[..., None] * _grouped(key, made)).sum(3)
        if inverse is not None:
            along = (_grouped(grad * score, made).sum(-1, keepdim=True) * inverse.square()).div_(-key.shape[-1])
            d_made = d_made.addcmul_(made.to(wide), along)
        d_key = slope[..., None] * made[..., None, :]
        return d_key.flatten(2, 3).transpose(1, 2).to(key.dtype), d_made.to(made.dtype), None, None
