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
    """The zero curve of G(u, t) = u - (1-t) u0 - t f(u) from (u0, 0) to its first arrival at t = 1.

    For bounded f and almost every u0 the curve exists and arrives (Chow, Mallet-Paret and Yorke 1978). The heading is
    the null vector of G's Jacobian that makes a positive determinant with it, all the way: a step that lands on a
    piece that runs the other way shows as a turn.
    """

    def value(z: Array) -> Array:
        return z[:-1] - (1 - z[-1]) * u0 - z[-1] * f(z[None, :-1])[0]

    def slope(z: Array) -> Array:  # [n, n + 1]
        u, t = z[:-1], z[-1]
        return np.column_stack([np.eye(u.size) - t * complex_step(f, u), u0 - f(u[None])[0]])

    def heading(z: Array) -> Array:
        jacobian = slope(z)
        null = np.linalg.svd(jacobian)[2][-1]
        return np.asarray(null * np.linalg.slogdet(np.vstack([jacobian, null]))[0])

    z, length = np.append(u0, 0.0), 0.05
    ahead = heading(z)
    for _ in range(max_steps):
        if length < 1e-12:
            break
        guess = new = z + length * ahead
        for _ in range(5):
            off = np.append(value(new), ahead @ (new - guess))
            new = new - np.linalg.solve(np.vstack([slope(new), ahead]), off)
        turned, moved = heading(new), np.linalg.norm(new - guess)
        passed = ahead[-1] > 0 > turned[-1] and z[-1] + 1.1 * length * ahead[-1] >= 1  # t may have gone to 1 and back
        if np.abs(value(new)).max() > 1e-10 or turned @ ahead < 0.97 or moved > 0.2 * length or passed:
            length /= 2
            continue
        if new[-1] >= 1:
            root = newton(f, z[:-1] + (new - z)[:-1] * (1 - z[-1]) / (new - z)[-1], tol)
            if root is not None and np.abs(root - new[:-1]).max() <= 2 * length:
                return root
            length /= 2
            continue
        z, ahead, length = new, turned, min(1.5 * length, 0.1)
    raise RuntimeError("no root found: Newton and the homotopy curve both failed")


def root_from(f: Map, u0: Array, tol: float) -> Array:
    """A root of u = f(u): Newton's from u0 where it succeeds, else the curve's."""
    root = newton(f, u0, tol)
    return follow_curve(f, u0, tol) if root is None else root


def contracted_root(f: Map, u0: Array, tol: float) -> Array | None:
    """The root that u <- f(u) contracts to, judged by three steps; None where it does not.

    Each step has to be at most half the one before (largest component; steps within ``tol`` pass), and plain Newton,
    kept in [0, 1], has to get from there to a root within the length of the third.
    """
    steps, u = [], u0
    for _ in range(3):
        new = f(u[None])[0]
        steps.append(np.abs(new - u).max())
        u = new
    if steps[1] > max(steps[0] / 2, tol) or steps[2] > max(steps[1] / 2, tol):
        return None
    start = u
    for _ in range(8):
        r = f(u[None])[0] - u
        if np.abs(r).max() <= tol:
            break
        u = (u + np.linalg.solve(np.eye(u.size) - complex_step(f, u), r)).clip(0, 1)
        if np.abs(u - start).max() > max(steps[2], tol):
            return None
    return u if np.abs(f(u[None])[0] - u).max() <= tol else None


def damped_root(f: Map, u0: Array, tol: float) -> Array | None:
    """Newton's root from u0 in [0, 1]^n: steps of length 1, 1/2 or 1/4, the first that is good enough."""
    u = u0
    for _ in range(20):
        r = f(u[None])[0] - u
        if np.abs(r).max() <= tol:
            break
        step = np.linalg.solve(np.eye(u.size) - complex_step(f, u), r)
        trials = [(length, (u + length * step).clip(0, 1)) for length in (1.0, 0.5, 0.25)]
        fit = [v for s, v in trials if np.abs(f(v[None])[0] - v).max() <= (1 - s / 4) * np.abs(r).max()]
        if not fit:
            return None
        u = fit[0]
    return u if np.abs(f(u[None])[0] - u).max() <= tol else None


def row_root(f: Map, size: int, tol: float) -> tuple[Array, str]:
    """The root of a row's equation p = f(p) that is reached from p = 1, and how it was reached.

    The one that Picard's iteration contracts to ("picard"); where it does not, damped Newton's ("newton"); where that
    stalls, the first arrival of the homotopy curve ("curve").
    """
    ones = np.ones(size)
    for way, method in (("picard", contracted_root), ("newton", damped_root)):
        root = method(f, ones, tol)
        if root is not None:
            return root, way
    return follow_curve(f, ones, tol), "curve"


def sigmoid(u: Array) -> Array:
    """1 / (1 + exp(-u)), analytic, safe for large |u|."""
    e = np.exp(np.where(u.real > 0, -u, u))
    return np.where(u.real > 0, 1 / (1 + e), e / (1 + e))


def bisect(g: Callable[[float], float], lo: float, hi: float) -> float:
    """The root of g with g(lo) <= 0 <= g(hi), to the last bit."""
    while lo < (mid := (lo + hi) / 2) < hi:
        lo, hi = (mid, hi) if g(mid) <= 0 else (lo, mid)
    return hi


def largest_roots(c: Array, beta: Array) -> Array:
    """Largest roots of g(p) = p - sigmoid(c + beta p) on [0, 1], [R], bisected between the turning points of g.

    g(0) < 0 < g(1); for beta > 4, g falls only between p- and p+, where sigmoid' = 1 / beta.
    """

    def g(p: Array) -> Array:
        return np.asarray(p - sigmoid(c + beta * p))

    logit = 2 * np.arctanh(np.sqrt(1 - 4 / np.maximum(beta, 4)))
    p_minus, p_plus = ((s * logit - c) / np.maximum(beta, 4) for s in (-1, 1))
    right = (beta > 4) & (p_plus < 1) & ((p_plus <= 0) | (g(p_plus) <= 0))
    lo = np.where(right, np.maximum(p_plus, 0), 0.0)
    hi = np.where((beta > 4) & ~right, np.minimum(p_minus, 1), 1.0)
    for _ in range(1100):  # as many doublings as there are floats in [0, 1]
        mid = (lo + hi) / 2
        if not ((lo < mid) & (mid < hi)).any():
            break
        low = g(mid) <= 0
        lo, hi = np.where(low, mid, lo), np.where(low, hi, mid)
    return hi


def largest_root(c: float, beta: float) -> float:
    """`largest_roots` of one equation."""
    return float(largest_roots(np.array([c]), np.array([beta]))[0])


def scanned_root(g: Map) -> float:
    """Largest root of any g, [C] -> [C], with g(0) < 0 < g(1), as far as a grid dense at both ends shows."""
    grid = np.concatenate([[0.0], sigmoid(np.linspace(-30, 30, 4001)), [1.0]])
    below = int(np.flatnonzero(g(grid[:-1]) <= 0)[-1])
    return bisect(lambda p: float(g(np.array([p]))[0]), grid[below], grid[below + 1])
