"""The models once more, in NumPy and float64: embedding, norms, attention, gated MLP, heads."""

from __future__ import annotations

import numpy as np
import torch

from implicit_attention import ImplicitQueryAttention, RelativeBias, Rotary
from tests import oracle
from tests.bridge import array, problem_of


def rms_norm(x, norm):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * array(norm.weight)


def linear(x, module):
    out = x @ array(module.weight).T
    return out if module.bias is None else out + array(module.bias)


def gated_mlp(x, mlp):
    gate = linear(x, mlp.gate)
    return linear(gate / (1 + np.exp(-gate)) * linear(x, mlp.up), mlp.down)


def rotate(t, base):
    n, d = t.shape[-2:]
    angle = np.arange(n)[:, None] * base ** (-2.0 * np.arange(d // 2) / d)
    pair = t[..., : d // 2] + 1j * t[..., d // 2 :]
    turned = pair * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def heads(t, count):
    return t.reshape(*t.shape[:-1], count, -1).swapaxes(-2, -3)


def ordinary(layer, x, hidden):
    """Softmax attention, dense; a token that sees nothing gets zeros."""
    repeat = layer.num_heads // layer.num_kv_heads
    q, k = heads(linear(x, layer.W_Q), layer.num_heads), heads(linear(x, layer.W_K), layer.num_kv_heads)
    v = heads(x if layer.W_V is None else linear(x, layer.W_V), layer.num_kv_heads)
    k, v = k.repeat(repeat, 1), v.repeat(repeat, 1)
    if layer.temperature is not None:
        q, k = (t / np.sqrt((t * t).mean(-1, keepdims=True) + 1e-6) for t in (q, k))
        q = q * array(layer.temperature)[:, None, None]
    if isinstance(layer.positions, Rotary):
        q, k = rotate(q, layer.positions.base), rotate(k, layer.positions.base)
    n = x.shape[1]
    offset = np.arange(n)[:, None] - np.arange(n)
    scores = q @ k.swapaxes(-1, -2) * layer.scale
    if isinstance(layer.positions, RelativeBias):
        reach = layer.positions.max_distance
        scores = scores + array(layer.positions.table)[:, offset.clip(-reach, reach) + reach]
    seen = (offset >= 0) if layer.is_causal else np.ones_like(offset, dtype=bool)
    seen = seen & (offset < (layer.window or n)) & ~hidden[:, None, None, :]
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    y = (weights @ v).swapaxes(1, 2).reshape(x.shape)
    return (y if layer.out_proj is None else linear(y, layer.out_proj)), weights


def implicit(layer, x, hidden):
    """The equilibrium as the layer's own oracle finds it, and its weights."""
    mask = torch.from_numpy(hidden) if hidden.any() else None
    t = torch.from_numpy(x)
    problem = problem_of(layer, t, key_padding_mask=mask)
    y = oracle.solve_rows(problem) if layer.is_causal else oracle.solve(problem)
    return (y if layer.out_proj is None else linear(y, layer.out_proj)), oracle.attention_weights(problem, y)


def last_hidden_state(model, tokens, hidden=None):
    """`[B, N, D]`, all hidden states and all attention matrices, for tokens `[B, N]` and padding `[B, N]`."""
    x = array(model.embed_tokens.weight)[tokens.numpy()]
    hidden = np.zeros(tokens.shape, dtype=bool) if hidden is None else hidden
    states, attentions = [x], []
    for block in model.layers:
        attend = implicit if isinstance(block.attention, ImplicitQueryAttention) else ordinary
        y, weights = attend(block.attention, rms_norm(x, block.attention_norm), hidden)
        x = x + y
        x = x + gated_mlp(rms_norm(x, block.mlp_norm), block.mlp)
        states.append(x)
        attentions.append(weights)
    states[-1] = rms_norm(x, model.norm)
    return states[-1], states, attentions
