"""The seed's class in NumPy, forward and, by hand, backward."""

from __future__ import annotations

import numpy as np

from tests.causal.oracle_roots import Array


def softmax(s: Array, visible: Array | bool = True) -> Array:
    """Softmax over the last axis of the visible entries; rows with none are zero. Analytic in ``s``."""
    visible = np.broadcast_to(visible, s.shape)
    top = np.where(visible, s.real, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    shifted = np.where(visible, s, 0) - np.where(np.isfinite(top), top, 0)
    e = np.where(visible, np.exp(np.where(visible, shifted, 0)), 0)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def seed_forward(x: Array, omega_q: Array, w_k: Array, omega_v: Array, n_iters: int) -> tuple[Array, list[Array]]:
    """The seed's class: y <- softmax(K (Omega_Q y)^T / sqrt(D)) V from y = V. x [B,N,D], weights [out,in].

    Returns: y [B,N,D] and the history [V, y_1, ..., y_n], n_iters + 1 arrays.
    """
    k, v = x @ w_k.T, x @ omega_v.T
    history = [v]
    for _ in range(n_iters):
        q = history[-1] @ omega_q.T
        history.append(softmax(k @ q.swapaxes(-1, -2) / np.sqrt(x.shape[-1])) @ v)
    return history[-1], history


def seed_backward(
    x: Array, omega_q: Array, w_k: Array, omega_v: Array, n_iters: int, grad_y: Array
) -> dict[str, Array]:
    """Reverse mode through the unrolled loop of ``seed_forward``, by hand. Keys: x, omega_q, w_k, omega_v."""
    _, history = seed_forward(x, omega_q, w_k, omega_v, n_iters)
    k, v, root = x @ w_k.T, x @ omega_v.T, np.sqrt(x.shape[-1])
    dk, dv, d_omega_q, dy = np.zeros_like(k), np.zeros_like(v), np.zeros_like(omega_q), grad_y
    for y in reversed(history[:-1]):
        q = y @ omega_q.T
        p = softmax(k @ q.swapaxes(-1, -2) / root)  # [B, N, N]
        dp = dy @ v.swapaxes(-1, -2)
        dv = dv + p.swapaxes(-1, -2) @ dy
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) / root
        dk = dk + ds @ q
        dq = ds.swapaxes(-1, -2) @ k
        d_omega_q = d_omega_q + np.einsum("bni,bnj->ij", dq, y)
        dy = dq @ omega_q
    dv = dv + dy  # the loop starts at y = V
    d_w_k, d_omega_v = np.einsum("bni,bnj->ij", dk, x), np.einsum("bni,bnj->ij", dv, x)
    return dict(x=dk @ w_k + dv @ omega_v, omega_q=d_omega_q, w_k=d_w_k, omega_v=d_omega_v)
