"""The RMS norm of keys with one temperature per head, in few passes over memory.

With `r = 1 / sqrt(mean(k^2) + eps)` a head's keys become `c k`, `c = r t`. Their gradient is a combination of two
tensors, so no other tensor of their size is made or kept:

    dk = c g - c r^2 mean(g k) k      dt = sum of r (g . k)
"""

from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.map import NORM_EPS
from implicit_attention.equilibrium import maps


def normed_by_head(key: Tensor, temperature: Tensor) -> Tensor:
    """Return normed keys.

    Args:
        key: `[B, H, N, d]`.
        temperature: `[H]`.

    Returns:
        `[B, H, N, d]`, in the dtype of the keys.
    """
    if plain_operations():
        return _normed(key, temperature)[0]
    found: Tensor = _NormedByHead.apply(key, temperature)  # type: ignore[no-untyped-call]
    return found


def plain_operations() -> bool:
    """Return whether compilers or transforms want plain operations, or nobody wants a gradient."""
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling() or maps.transforms_active()
    return plain or torch.autograd.forward_ad._current_level >= 0  # a function of our own has no forward mode


def _normed(key: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Normed keys, and r, `[B, H, N, 1]`, in float32 or wider."""
    wide = key.to(torch.promote_types(key.dtype, torch.float32))
    inverse = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return (wide * (inverse * temperature[:, None, None].to(inverse.dtype))).to(key.dtype), inverse


class _NormedByHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, temperature: Tensor) -> Tensor:
        normed, inverse = _normed(key, temperature)
        ctx.save_for_backward(key, temperature, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, temperature, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or maps.transforms_active():  # to be differentiated again
            with torch.enable_grad():
                given = [t for t, needed in zip((key, temperature), ctx.needs_input_grad, strict=True) if needed]
                found = iter(torch.autograd.grad(_normed(key, temperature)[0], given, grad, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        grad, wide = grad.to(inverse.dtype), key.to(inverse.dtype)
        along = (grad * wide).sum(-1, keepdim=True) * inverse  # [B, H, N, 1]
        factor = inverse * temperature[:, None, None].to(inverse.dtype)
        d_key = (grad * factor).addcmul_(wide, (factor * inverse * along).div_(-key.shape[-1]))
        return d_key.to(key.dtype), along.sum((0, 2, 3)).to(temperature.dtype)
