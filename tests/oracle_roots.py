"""Root finding for the oracle: u = f(u) in R^n by Newton and by a homotopy, and scalar roots by bisection.

Maps take a stack of points, ``[C, n] -> [C, n]``, real or complex; slopes are taken by the complex step,
``df = Im f(u + i h e) / h``, which has no cancellation error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Map = Callable[[Array], Array]  # [C, n] -> [C, n]
STEP = 1e-30  # complex step


def complex_step(f: Map, u: Array, chunk: int = 256) -> Array:
    """Jacobian [n, n] of f at u [n]; entry (a, c) is d f_a / d u_c."""
    parts = np.split(np.eye(u.size), range(chunk, u.size, chunk))
    return np.concatenate([f(u + 1j * STEP * part).imag / STEP for part in parts]).T


def newton(f: Map, u: Array, tol: float, max_steps: int = 100) -> Array | None:
    """Newton with step halving on the norm of f(u) - u. None when it stalls above ``tol``."""
    r = f(u[None])[0] - u
    for _ in range(max_steps):
        if np.abs(r).max() <= tol * max(1.0, np.abs(u).max()):
            return u
        step, t = np.linalg.solve(np.eye(u.size) - complex_step(f, u), r), 1.0
        trial = f((u + step)[None])[0] - (u + step)
        while np.linalg.norm(trial) > (1 - 1e-4 * t) * np.linalg.norm(r):
            t /= 2
            if t < 1e-6:
                return None
            trial = f((u + t * step)[None])[0] - (u + t * step)
        u, r = u + t * step, trial
    return None


def follow_curve(f: Map, u0: Array, tol: float, max_steps: int = 5000) -> Array:
    """The zero curve of G(u, t) = u - (1-t) u0 - t f(u) from (u0, 0) to t = 1, by pseudo-arclength.

    For bounded f and almost every u0 the curve exists and arrives (Chow, Mallet-Paret and Yorke 1978).
    """

    def value(z: Array) -> Array:
        return z[:-1] - (1 - z[-1]) * u0 - z[-1] * f(z[None, :-1])[0]

    def slope(z: Array) -> Array:  # [n, n + 1]
        u, t = z[:-1], z[-1]
        return np.column_stack([np.eye(u.size) - t * complex_step(f, u), u0 - f(u[None])[0]])

    z, length = np.append(u0, 0.0), 0.05
    heading = np.append(np.zeros_like(u0), 1.0)
    for _ in range(max_steps):
        if length < 1e-12:
            break
        tangent = np.linalg.svd(slope(z))[2][-1]
        tangent = tangent * np.sign(tangent @ heading)
        guess = new = z + length * tangent
        for _ in range(5):
            off = np.append(value(new), tangent @ (new - guess))
            new = new - np.linalg.solve(np.vstack([slope(new), tangent]), off)
        turn, moved = np.linalg.svd(slope(new))[2][-1], np.linalg.norm(new - z)
        if np.abs(value(new)).max() > 1e-10 or abs(turn @ tangent) < 0.95 or moved > 2 * length:
            length /= 2
            continue
        if new[-1] >= 1:
            root = newton(f, z[:-1] + (new - z)[:-1] * (1 - z[-1]) / (new - z)[-1], tol)
            if root is not None:
                return root
            length /= 2
            continue
        z, heading, length = new, tangent, min(1.5 * length, 0.5)
    raise RuntimeError("no root found: Newton and the homotopy curve both failed")


def root_from(f: Map, u0: Array, tol: float) -> Array:
    """A root of u = f(u): Newton's from u0 where it succeeds, else the curve's."""
    root = newton(f, u0, tol)
    return follow_curve(f, u0, tol) if root is None else root


def sigmoid(u: Array) -> Array:
    """1 / (1 + exp(-u)), analytic, safe for large |u|."""
    e = np.exp(np.where(u.real > 0, -u, u))
    return np.where(u.real > 0, 1 / (1 + e), e / (1 + e))


def bisect(g: Callable[[float], float], lo: float, hi: float) -> float:
    """The root of g with g(lo) <= 0 <= g(hi), to the last bit."""
    while lo < (mid := (lo + hi) / 2) < hi:
        lo, hi = (mid, hi) if g(mid) <= 0 else (lo, mid)
    return hi


def largest_root(c: float, beta: float) -> float:
    """Largest root of g(p) = p - sigmoid(c + beta p) on [0, 1], bracketed between the turning points of g.

    g(0) < 0 < g(1); for beta > 4, g falls only between p- and p+, where sigmoid' = 1 / beta.
    """

    def g(p: float) -> float:
        return p - float(sigmoid(np.array(c + beta * p)))

    if beta <= 4:
        return bisect(g, 0.0, 1.0)
    logit = 2 * np.arctanh(np.sqrt(1 - 4 / beta))
    p_minus, p_plus = (-logit - c) / beta, (logit - c) / beta
    if p_plus < 1 and (p_plus <= 0 or g(p_plus) <= 0):
        return bisect(g, max(p_plus, 0.0), 1.0)
    return bisect(g, 0.0, min(p_minus, 1.0))


def scanned_root(g: Map) -> float:
    """Largest root of any g, [C] -> [C], with g(0) < 0 < g(1), as far as a grid dense at both ends shows."""
    grid = np.concatenate([[0.0], sigmoid(np.linspace(-30, 30, 4001)), [1.0]])
    below = int(np.flatnonzero(g(grid[:-1]) <= 0)[-1])
    return bisect(lambda p: float(g(np.array([p]))[0]), grid[below], grid[below + 1])
