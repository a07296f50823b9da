"""Float64 oracle for implicit-query attention, in NumPy alone; it shares no code with the package.

Everything is dense and slow. ``apply`` uses analytic operations only, so it accepts complex arrays and every
derivative is taken by the complex step.
Layouts: state ``[B, N, D]``, heads ``[B, H, N, d]``, scores ``[B, H, N, M]`` (rows are outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from tests.causal.oracle_roots import STEP, Array, Map, complex_step, largest_root, root_from, row_root
from tests.oracle_seed import seed_backward, seed_forward, softmax

__all__ = [
    "Problem",
    "apply",
    "attention_weights",
    "gradient",
    "initial_guess",
    "jacobian",
    "keys",
    "phi",
    "picard",
    "seed_backward",
    "seed_forward",
    "softmax",
    "solve",
    "solve_rows",
    "values",
]

EPS = 1e-6  # of the RMS norm


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One equilibrium y = F(y) with all its data; weights [out, in]; the default is the seed."""

    x: Array  # [B, N, D]
    omega_q: Array  # [D, D]
    w_k: Array  # [D, D]
    omega_v: Array | None = None  # [D, D]; None means values="identity"
    w_q: Array | None = None  # [D, D]; given means query_input=True
    omega_q_bias: Array | None = None  # [D], as the three below
    w_k_bias: Array | None = None
    omega_v_bias: Array | None = None
    w_q_bias: Array | None = None
    context: Array | None = None  # [B, M, D], keys and values come from it; only with normalize_over="keys"
    num_heads: int = 1
    is_causal: bool = False
    self_query: Literal["output", "input"] = "output"  # has no meaning with normalize_over="keys"
    normalize_over: Literal["queries", "keys"] = "queries"
    qk_norm: bool = False
    temperature: Array | None = None  # [H], with qk_norm; None means ones
    rotary_base: float | None = None
    score_bias: Array | None = None  # [..., H, N, M], added to the scaled scores; -inf hides
    mask: Array | None = None  # bool [B, N, M], True = NOT visible
    scale: float | None = None  # None means head_dim ** -0.5

    def __post_init__(self) -> None:
        cross, coupled = self.context is not None, self.normalize_over == "queries"
        if cross and (coupled or self.is_causal):
            raise ValueError("context needs normalize_over='keys' and is_causal=False")
        if self.self_query == "input" and coupled and not self.is_causal:
            raise ValueError("self_query='input' needs is_causal=True")
        if self.temperature is not None and not self.qk_norm:
            raise ValueError("temperature needs qk_norm=True")
        for weight, bias in ((self.omega_v, self.omega_v_bias), (self.w_q, self.w_q_bias)):
            if weight is None and bias is not None:
                raise ValueError("omega_v_bias needs omega_v, and w_q_bias needs w_q")
        for f in fields(self):
            a, dtypes = getattr(self, f.name), "?" if f.name == "mask" else "dD"
            if isinstance(a, np.ndarray) and a.dtype.char not in dtypes:
                raise ValueError(f"{f.name} must be float64 (mask: bool), got {a.dtype}")


def linear(t: Array, weight: Array, bias: Array | None) -> Array:
    """nn.Linear: t W^T + b."""
    return t @ weight.T if bias is None else t @ weight.T + bias


def to_heads(problem: Problem, t: Array) -> Array:
    """[..., N, D] -> [..., H, N, d]; head h owns the features h d ... (h + 1) d."""
    h = problem.num_heads
    return t.reshape(*t.shape[:-1], h, t.shape[-1] // h).swapaxes(-2, -3)


def norm_and_rotate(problem: Problem, t: Array, positions: Array) -> Array:
    """RMS norm without gain over the head dim, then the rotary rotation. t [..., N, d], positions [N]."""
    if problem.qk_norm:
        t = t / np.sqrt((t * t).mean(axis=-1, keepdims=True) + EPS)
    if problem.rotary_base is not None:
        d = t.shape[-1]
        angle = positions[:, None] * problem.rotary_base ** (-2.0 * np.arange(d // 2) / d)  # [N, d/2]
        t1, t2 = t[..., : d // 2], t[..., d // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        t = np.concatenate([t1 * cos - t2 * sin, t1 * sin + t2 * cos], axis=-1)
    return t


def initial_guess(problem: Problem) -> Array:
    """y0 = Omega_V x (of the state's x, also for cross-attention), or x with identity values. [B, N, D]."""
    return problem.x if problem.omega_v is None else linear(problem.x, problem.omega_v, problem.omega_v_bias)


def values(problem: Problem) -> Array:
    """v = Omega_V x, of the context if there is one. [B, M, D]."""
    source = problem.x if problem.context is None else problem.context
    return initial_guess(replace(problem, x=source, context=None))


def keys(problem: Problem) -> Array:
    """k = rope(norm(W_K x + b)), of the context if there is one. [B, H, M, d]."""
    source = problem.x if problem.context is None else problem.context
    k = to_heads(problem, linear(source, problem.w_k, problem.w_k_bias))
    return norm_and_rotate(problem, k, np.arange(source.shape[-2]))


def phi(problem: Problem, y: Array, rows: Array) -> Array:
    """rope(norm(Omega_Q y + b [+ W_Q x + b])) of the tokens ``rows``. y [C,R,D] -> [C,H,R,d]."""
    q = linear(y, problem.omega_q, problem.omega_q_bias)
    if problem.w_q is not None:
        q = q + linear(problem.x[:, rows], problem.w_q, problem.w_q_bias)
    return norm_and_rotate(problem, to_heads(problem, q), rows)


def gain(problem: Problem) -> Array | float:
    """What multiplies k.q: scale times the head's temperature, [H, 1, 1] or a float."""
    scale = (problem.x.shape[-1] // problem.num_heads) ** -0.5 if problem.scale is None else problem.scale
    return scale if problem.temperature is None else scale * problem.temperature[:, None, None]


def visible_entries(problem: Problem) -> Array:
    """Which entries take part in the softmax, bool broadcastable to [B, H, N, M]."""
    n = problem.x.shape[-2]
    m = n if problem.context is None else problem.context.shape[-2]
    visible = np.tri(n, m, dtype=bool)[None, None] if problem.is_causal else np.ones((1, 1, n, m), dtype=bool)
    if problem.mask is not None:
        visible = visible & ~problem.mask[:, None]
    return visible if problem.score_bias is None else visible & (problem.score_bias.real > -np.inf)


def attention_weights(problem: Problem, y: Array) -> Array:
    """P [B,H,N,M] at the state y [B,N,D]. A batch of one broadcasts against a stack of states y [C,N,D]."""
    rows = np.arange(problem.x.shape[-2])
    k, q = keys(problem), phi(problem, y, rows)
    if problem.normalize_over == "keys":
        s = q @ k.swapaxes(-1, -2)
    else:
        s = k @ q.swapaxes(-1, -2)
        if problem.self_query == "input":  # row i's own column is made from v_i
            own = (k * phi(problem, initial_guess(problem), rows)).sum(axis=-1)  # [B, H, N]
            s = np.where(np.eye(len(rows), dtype=bool), own[..., None], s)
    s = gain(problem) * s
    return softmax(s if problem.score_bias is None else s + problem.score_bias, visible_entries(problem))


def apply(problem: Problem, y: Array) -> Array:
    """F(y): head h of row i is sum_j P_hij v_hj. [B,N,D] -> [B,N,D]; real or complex."""
    out = attention_weights(problem, y) @ to_heads(problem, values(problem))  # [B, H, N, d]
    return out.swapaxes(-2, -3).reshape(y.shape)


def picard(problem: Problem, n: int) -> Array:
    """n plain iterations y <- F(y) from the initial guess. [B, N, D]."""
    y = initial_guess(problem)
    for _ in range(n):
        y = apply(problem, y)
    return y


def sample(problem: Problem, b: int) -> Problem:
    """The problem of batch entry b alone, with a batch of one."""
    picked = {"x": problem.x[b : b + 1]}
    for name, ndim in (("context", 3), ("mask", 3), ("score_bias", 4)):
        a = getattr(problem, name)
        if a is not None and a.ndim == ndim and len(a) > 1:  # else it has no batch of its own
            picked[name] = a[b : b + 1]
    return _with(problem, picked)


def _with(problem: Problem, arrays: dict[str, Any]) -> Problem:
    return replace(problem, **arrays)


def flat_map(problem: Problem, b: int) -> Map:
    """F of batch entry b on flattened states, stacks [C, N D] -> [C, N D]."""
    one = sample(problem, b)
    return lambda u: apply(one, u.reshape(-1, *one.x.shape[1:])).reshape(u.shape)


def jacobian(problem: Problem, b: int, y: Array) -> Array:
    """dF/dy [N D, N D] of batch entry b at y, the whole state [B, N, D]."""
    return complex_step(flat_map(problem, b), y[b].ravel())


def solve(problem: Problem, start: Array | None = None, tol: float = 1e-13) -> Array:
    """y = F(y) [B,N,D] by dense Newton from ``start`` or the initial guess, |F(y) - y| <= tol max(1, |y|).

    Where there are several roots, only a nearby ``start`` says which one comes back.
    """
    y0 = initial_guess(problem) if start is None else start
    roots = [root_from(flat_map(problem, b), y0[b].ravel(), tol) for b in range(len(y0))]
    return np.stack(roots).reshape(y0.shape)


def gradient(problem: Problem, y_star: Array, grad_y: Array, wrt: Sequence[str] | None = None) -> dict[str, Array]:
    """Implicit gradients of a loss with dL/dy* = grad_y, for every float array of the problem (or ``wrt``).

    (I - J^T) lam = grad_y per sample, then dL/dtheta = lam . dF/dtheta with y* held, one direction at a time.
    """
    lam = np.empty_like(y_star)
    for b in range(len(y_star)):
        adjoint = np.eye(y_star[b].size) - jacobian(problem, b, y_star).T
        lam[b] = np.linalg.solve(adjoint, grad_y[b].ravel()).reshape(y_star[b].shape)
    arrays = {f.name: getattr(problem, f.name) for f in fields(problem) if f.name != "mask"}
    result = {}
    for name, a in arrays.items():
        if isinstance(a, np.ndarray) and (wrt is None or name in wrt):
            result[name] = np.zeros_like(a)
            for index in np.ndindex(*a.shape):
                moved = a.astype(complex)
                moved[index] += 1j * STEP
                slope = apply(_with(problem, {name: moved}), y_star).imag / STEP
                result[name][index] = (lam * slope).sum()
    return result


def solve_rows(problem: Problem, tol: float = 1e-13) -> Array:
    """A causal equilibrium [B,N,D] by forward substitution, each row's own unknown starting at y_i = v_i.

    Over queries y_i = (1-p) a_i + p v_i per head, p the weight of the row's own column. One head with linear phi: the
    largest root; else the root that Picard's iteration contracts to from p = 1, else damped Newton's, else the
    curve's (``row_root``). Over keys the unknown is y_i, of D dimensions.
    """
    if not problem.is_causal:
        raise ValueError("solve_rows needs is_causal=True")
    y = np.zeros_like(initial_guess(problem))
    for b in range(len(y)):
        one = sample(problem, b)
        for i in range(y.shape[1]):
            by_key = problem.normalize_over == "keys"
            y[b, i] = _key_row(one, i, tol) if by_key else _query_row(one, y[b], i, tol)
    return y


def _key_row(one: Problem, i: int, tol: float) -> Array:
    y0 = initial_guess(one)

    def f(u: Array) -> Array:  # [C, D]; the other rows do not matter
        y = np.repeat(y0.astype(u.dtype), len(u), axis=0)
        y[:, i] = u
        return np.asarray(apply(one, y)[:, i])

    return root_from(f, y0[0, i], tol)


def _query_row(one: Problem, y: Array, i: int, tol: float) -> Array:
    """Row i [D] given the rows y[:i]."""
    h, n = one.num_heads, len(y)
    k, v = keys(one)[:, :, i : i + 1], to_heads(one, values(one))[0]  # [1, H, 1, d], [H, N, d]
    bias = np.zeros((h, n, n)) if one.score_bias is None else np.broadcast_to(one.score_bias, (1, h, n, n))[0]
    visible = np.broadcast_to(visible_entries(one), (1, h, n, n))[0, :, i, : i + 1]  # [H, i + 1]

    def score(states: Array, rows: Array) -> Array:  # [C, R, D] -> [C, H, R]
        return (gain(one) * (k @ phi(one, states, rows).swapaxes(-1, -2)))[:, :, 0] + bias[:, i, rows]

    def own(y_i: Array) -> Array:  # [C, D] -> [C, H, 1]
        return score(y_i[:, None], np.array([i]))

    past = score(y[None, :i], np.arange(i))  # [1, H, i]
    a = (softmax(past, visible[:, :i])[0, :, None] @ v[:, :i])[:, 0]  # [H, d]

    def state(p: Array) -> Array:  # [C, H] -> [C, D]
        return np.reshape((1 - p)[..., None] * a + p[..., None] * v[:, i], (len(p), -1))

    def mix(y_i: Array) -> Array:  # [C, D] -> p [C, H], the weight of the own column
        s = np.concatenate([np.repeat(past, len(y_i), axis=0), own(y_i)], axis=-1)
        return softmax(s, visible)[..., -1]

    one_p = np.ones((1, h))
    if one.self_query == "input":
        p = mix(v[None, :, i].reshape(1, -1))[0]
    elif h > 1 or one.qk_norm or not (visible[:, :i].any() and visible[0, i]):  # without past or self, p is 1 or 0
        p = row_root(lambda p: mix(state(p)), h, tol)[0]
    else:  # one head, linear phi: the score is alpha + beta p
        alpha, whole = (float(own(state(t * one_p))[0, 0, 0]) for t in (0.0, 1.0))
        log_norm = np.logaddexp.reduce(past[0, 0][visible[0, :i]])
        p = np.array([largest_root(alpha - log_norm, whole - alpha)])
    return np.asarray(state(p[None])[0])
