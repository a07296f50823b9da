"""The oracle of `values="feedback"`: the definition, one row after the other, differentiated by autograd."""

import torch
from torch import Tensor

from implicit_attention import ALiBi, ImplicitQueryAttention, RelativeBias, Rotary


def outputs(
    layer: ImplicitQueryAttention, x: Tensor, *, hidden: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Return the equilibrium `[B, N, D]` for x `[B, N, D]`.

    Args:
        layer: The layer; its parameters may have any dtype that x has.
        x: The input.
        hidden: `[B or 1, H or 1, N, N]`, bool: what a row does not see beside what is causal.
        keep: `[B, H, N, N]`, factors on the weights.
    """
    batch, length, size = x.shape
    heads, groups, d = layer.num_heads, layer.num_kv_heads, layer.head_dim

    def each(t: Tensor) -> Tensor:  # [B, G, ...] -> [B, H, ...]
        return t.repeat_interleave(heads // groups, 1)

    def query(y: Tensor, i: int) -> Tensor:  # [B, D] -> [B, G, d]
        made = 0 if layer.Omega_Q is None else layer.Omega_Q(y)
        made = made if layer.W_Q is None else made + layer.W_Q(x[:, i])
        return turned(layer, normed(layer, made.view(batch, groups, d)), i)

    def fed(y: Tensor) -> Tensor:  # [B, D] -> [B, G, d]
        read = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() if layer.feedback_norm else y
        return layer.Psi_V(read).view(batch, groups, d)

    queries = values = x.new_zeros(batch, groups, 0, d)  # of all rows so far
    rows = []
    for i in range(length):
        key = normed(layer, layer.W_K(x[:, i]).view(batch, heads, d))
        key = key if layer.temperature is None else key * layer.temperature[:, None]
        key, value = turned(layer, key, i), layer.Omega_V(x[:, i]).view(batch, groups, d)
        own = query(each(value).reshape(batch, size), i)
        columns, seen = torch.cat([queries, own[:, :, None]], 2), torch.cat([values, value[:, :, None]], 2)
        scores = (each(columns) @ key[..., None])[..., 0] * layer.scale + offset_bias(layer, i).to(x.dtype)
        unseen = torch.zeros(batch, heads, i + 1, dtype=torch.bool)
        if layer.window is not None:
            unseen[..., : max(0, i + 1 - layer.window)] = True
        if hidden is not None:
            unseen |= hidden[..., i, : i + 1]
        weights = scores.masked_fill(unseen, -1e30).softmax(-1).masked_fill(unseen, 0.0)
        weights = weights if keep is None else weights * keep[..., i, : i + 1]
        y = (weights[..., None] * each(seen)).sum(2).view(batch, size)
        rows.append(y)
        queries = torch.cat([queries, query(y, i)[:, :, None]], 2)
        values = torch.cat([values, (value + fed(y))[:, :, None]], 2)
    return torch.stack(rows, 1)


def normed(layer: ImplicitQueryAttention, t: Tensor) -> Tensor:
    """RMS norm over the head dimension, where the layer has it."""
    return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() if layer.qk_norm else t


def turned(layer: ImplicitQueryAttention, t: Tensor, i: int) -> Tensor:
    """The rotary rotation at position i, where the layer has it."""
    if not isinstance(layer.positions, Rotary):
        return t
    half = t.shape[-1] // 2
    angle = i * layer.positions.base ** (-torch.arange(half, dtype=t.dtype) / half)
    first, second = t[..., :half], t[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def offset_bias(layer: ImplicitQueryAttention, i: int) -> Tensor:
    """What positions add to the scores of row i, `[H, i + 1]`."""
    offset = i - torch.arange(i + 1)
    if isinstance(layer.positions, ALiBi):
        slopes = 2.0 ** (-8.0 * torch.arange(1, layer.num_heads + 1) / layer.num_heads)
        return -slopes[:, None] * offset
    if isinstance(layer.positions, RelativeBias):
        reach = layer.positions.max_distance
        return layer.positions.table[:, offset.clamp(max=reach) + reach]
    return torch.zeros(layer.num_heads, i + 1)
