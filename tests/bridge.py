"""From the package to the oracle: a layer and its inputs as an `oracle.Problem`, and gradients side by side."""

from __future__ import annotations

import numpy as np
import torch

from implicit_attention import ALiBi, Anderson, ImplicitQueryAttention, RelativeBias, Rotary
from implicit_attention.decoding import decode, serves
from implicit_attention.equation.projection import project
from implicit_attention.inputs import checked
from tests import oracle

# Rounding leaves residuals near 1e-15: solved this far, an equilibrium is known to 1e-12 / (1 - contraction).
TIGHT = Anderson(rtol=1e-13, atol=1e-13, max_steps=400)


def array(t):
    return None if t is None else t.detach().to(torch.float64).numpy()


def make_layer(embed_dim, num_heads=1, *, gain=1.0, seed=0, **options):
    """A float64 layer, tightly solved; every parameter is random, those that start at constants too."""
    torch.manual_seed(seed)
    options = {"solver": TIGHT, "dtype": torch.float64, "on_failure": "raise"} | options
    layer = ImplicitQueryAttention(embed_dim, num_heads, **options)
    with torch.no_grad():
        if layer.Omega_Q is not None:
            layer.Omega_Q.weight.mul_(gain)
        for parameter in () if layer.Psi_V is None else layer.Psi_V.parameters():
            parameter.uniform_(-0.5, 0.5)
        if layer.temperature is not None:
            layer.temperature.uniform_(0.05, 0.1)  # the norm is steep near q = 0: keep it contracting
        if isinstance(layer.positions, RelativeBias):
            layer.positions.table.normal_(std=0.5)
    return layer


def offsets(n, m):
    return np.arange(n)[:, None] - np.arange(m)


def additive(mask):
    """A mask as numbers to add to the scores."""
    if mask.dtype == torch.bool:
        return np.where(mask.numpy(), -np.inf, 0.0)
    return array(mask)


def score_bias(layer, x, context, attn_mask, key_padding_mask):
    """Everything added to the scores, `[B or 1, H, N, M]`, or None."""
    B, N, _ = x.shape
    M, H = (x if context is None else context).shape[1], layer.num_heads
    total = np.zeros((1, H, N, M))
    parts = []
    if isinstance(layer.positions, ALiBi):
        slopes = 2.0 ** (-8.0 * np.arange(1, H + 1) / H)  # H a power of two
        parts.append(-slopes[:, None, None] * np.abs(offsets(N, M)))
    if isinstance(layer.positions, RelativeBias):
        reach = layer.positions.max_distance
        parts.append(array(layer.positions.table)[:, offsets(N, M).clip(-reach, reach) + reach])
    if attn_mask is not None:
        part = additive(attn_mask)
        parts.append(part if part.ndim == 2 else part.reshape(B, H, N, M))
    if layer.window is not None:
        parts.append(np.where(offsets(N, M) >= layer.window, -np.inf, 0.0))
    if key_padding_mask is not None:
        parts.append(additive(key_padding_mask)[:, None, None, :])
    return sum(parts, total) if parts else None


def problem_of(layer, x, context=None, *, attn_mask=None, key_padding_mask=None):
    """The equation that the layer solves, as the oracle states it."""

    def weight(linear):
        return None if linear is None else array(linear.weight)

    def bias(linear):
        return None if linear is None or linear.bias is None else array(linear.bias)

    names = {"omega_q": layer.Omega_Q, "w_k": layer.W_K, "omega_v": layer.Omega_V, "w_q": layer.W_Q}
    return oracle.Problem(
        x=array(x),
        context=array(context),
        **{name: weight(linear) for name, linear in names.items()},
        **{f"{name}_bias": bias(linear) for name, linear in names.items()},
        num_heads=layer.num_heads,
        is_causal=layer.is_causal,
        self_query=layer.self_query,
        normalize_over=layer.normalize_over,
        qk_norm=layer.qk_norm,
        temperature=array(layer.temperature),
        rotary_base=layer.positions.base if isinstance(layer.positions, Rotary) else None,
        score_bias=score_bias(layer, x, context, attn_mask, key_padding_mask),
        scale=layer.scale,
    )


def oracle_gradients(layer, problem, y, grad_y):
    """The oracle's gradients under the names of the layer's parameters, `x` and `context`."""
    found = oracle.gradient(problem, y, grad_y)
    renamed = {"omega_q": "Omega_Q", "w_k": "W_K", "omega_v": "Omega_V", "w_q": "W_Q"}
    named = {f"{new}.weight": found[old] for old, new in renamed.items() if old in found}
    named |= {f"{new}.bias": found[f"{old}_bias"] for old, new in renamed.items() if f"{old}_bias" in found}
    named |= {name: found[name] for name in ("x", "context", "temperature") if name in found}
    if isinstance(layer.positions, RelativeBias):
        table, reach = np.zeros(layer.positions.table.shape), layer.positions.max_distance
        per_entry = found["score_bias"].sum(0)  # [H, N, M]
        columns = offsets(*per_entry.shape[1:]).clip(-reach, reach) + reach
        for h in range(len(table)):
            np.add.at(table[h], columns, per_entry[h])
        named["positions.table"] = table
    return named


def close(found, expected, tol):
    """Compare up to `tol` times the largest expected entry, or absolutely where that is below one."""
    found = array(found) if isinstance(found, torch.Tensor) else found
    size = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tol * size)


def decoded(layer, x, cache):
    """What the short way of one new token makes of a call, given to its cache; None if it leaves it to the solver."""
    inputs = checked(layer.settings, layer.W_K.weight, x, cache=cache)
    found = decode(layer, inputs, project(layer, inputs)) if serves(layer, inputs) else None
    if found is None:
        return None
    found.fill_cache(cache)
    return found.solution
