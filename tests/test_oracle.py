"""The oracle against itself: other formulations of the same equations, finite differences, known roots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import oracle
from tests.causal.oracle_roots import STEP, Array, follow_curve, largest_root, newton, scanned_root, sigmoid
from tests.oracle import Problem


def make(
    b: int = 2,
    n: int = 5,
    d: int = 4,
    m: int | None = None,
    *,
    gain: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A random problem; ``options`` are fields of Problem, where True means a random array."""
    rng = np.random.default_rng(seed)
    h = options.get("num_heads", 1)
    shapes: dict[str, tuple[int, ...]] = dict(w_q=(d, d), temperature=(h,), score_bias=(h, n, m or n))
    shapes |= {f"{name}_bias": (d,) for name in ("omega_q", "w_k", "omega_v", "w_q")}
    weights = {name: gain * rng.normal(size=(d, d)) / math.sqrt(d) for name in ("omega_q", "w_k", "omega_v")}
    arrays: dict[str, Any] = dict(x=rng.normal(size=(b, n, d)), **weights)
    if m is not None:
        arrays["context"] = rng.normal(size=(b, m, d))
    for name, value in options.items():
        arrays[name] = rng.normal(size=shapes[name]) if value is True and name in shapes else value
    if options.get("mask") is True:
        arrays["mask"] = rng.random((b, n, m or n)) < 0.4
        arrays["mask"][0, 1] = True  # a row that sees nothing
    if options.get("temperature") is True:
        arrays["temperature"] = np.exp(arrays["temperature"])
    return Problem(**arrays)


CASES: dict[str, dict[str, Any]] = {
    "seed": {},
    "heads": dict(num_heads=2),
    "bias": dict(num_heads=2, omega_q_bias=True, w_k_bias=True, omega_v_bias=True, scale=0.3),
    "query_input": dict(w_q=True, w_q_bias=True),
    "identity": dict(omega_v=None, num_heads=4),
    "norm": dict(num_heads=2, qk_norm=True, temperature=True),
    "norm-rope": dict(num_heads=2, d=8, qk_norm=True, temperature=True, rotary_base=100.0),
    "mask-score_bias": dict(num_heads=2, mask=True, score_bias=True),
    "causal": dict(is_causal=True),
    "causal-mask": dict(is_causal=True, mask=True, score_bias=True),
    "causal-norm": dict(is_causal=True, qk_norm=True),
    "causal-heads": dict(is_causal=True, num_heads=2, w_q=True, score_bias=True, rotary_base=10.0, mask=True),
    "causal-input": dict(is_causal=True, num_heads=2, self_query="input", qk_norm=True, w_q=True, w_q_bias=True),
    "keys": dict(normalize_over="keys", num_heads=2, w_q=True, rotary_base=10.0),
    "keys-causal": dict(normalize_over="keys", num_heads=2, is_causal=True, mask=True, score_bias=True),
    "cross": dict(normalize_over="keys", m=3, num_heads=2, mask=True, score_bias=True, rotary_base=10.0),
    "cross-all": dict(normalize_over="keys", m=7, num_heads=2, d=8, w_q=True, qk_norm=True, temperature=True),
}
every_case = pytest.mark.parametrize("case", CASES)


def random_like(problem: Problem, seed: int = 7) -> Array:
    return np.random.default_rng(seed).normal(size=problem.x.shape)


def vary(problem: Problem, name: str, value: Array) -> Problem:
    changes: dict[str, Any] = {name: value}
    return replace(problem, **changes)


def matvec(weight: Array, vector: list[float], bias: Array | None) -> list[float]:
    out = [sum(float(w) * t for w, t in zip(row, vector, strict=True)) for row in weight]
    return out if bias is None else [o + float(c) for o, c in zip(out, bias, strict=True)]


def scalar_head(problem: Problem, vector: list[float], h: int, position: int) -> list[float]:
    """Head h of one token, normed and rotated, number by number."""
    d = len(vector) // problem.num_heads
    t = vector[h * d : (h + 1) * d]
    if problem.qk_norm:
        root = math.sqrt(sum(a * a for a in t) / d + 1e-6)
        t = [a / root for a in t]
    if problem.rotary_base is not None:
        pairs = [complex(t[i], t[i + d // 2]) for i in range(d // 2)]
        turned = [z * np.exp(1j * position / problem.rotary_base ** (2 * i / d)) for i, z in enumerate(pairs)]
        t = [float(z.real) for z in turned] + [float(z.imag) for z in turned]
    return t


def scalar_apply(problem: Problem, y: Array) -> Array:
    """F(y) once more, from the definitions, with no array arithmetic."""
    p, out = problem, np.zeros_like(y)
    d = y.shape[-1] // p.num_heads
    scale = 1 / math.sqrt(d) if p.scale is None else p.scale

    def query(b: int, j: int, state: list[float], h: int) -> list[float]:
        q = matvec(p.omega_q, state, p.omega_q_bias)
        if p.w_q is not None:
            q = [a + c for a, c in zip(q, matvec(p.w_q, list(p.x[b, j]), p.w_q_bias), strict=True)]
        return scalar_head(p, q, h, j)

    for b, i, h in np.ndindex(len(y), y.shape[1], p.num_heads):
        source = p.x[b] if p.context is None else p.context[b]
        v = [list(s) if p.omega_v is None else matvec(p.omega_v, list(s), p.omega_v_bias) for s in source]
        k = [scalar_head(p, matvec(p.w_k, list(s), p.w_k_bias), h, j) for j, s in enumerate(source)]
        scores = {}
        for j in range(len(source)):
            if (p.is_causal and j > i) or (p.mask is not None and p.mask[b, i, j]):
                continue
            if p.normalize_over == "keys":
                left, right = k[j], query(b, i, list(y[b, i]), h)
            else:
                own = p.self_query == "input" and i == j
                left, right = k[i], query(b, j, v[j] if own else list(y[b, j]), h)
            heat = 1.0 if p.temperature is None else float(p.temperature[h])
            scores[j] = scale * heat * sum(a * c for a, c in zip(left, right, strict=True))
            scores[j] += 0.0 if p.score_bias is None else float(p.score_bias[h, i, j])
        total = sum(math.exp(s) for s in scores.values())
        for j, s in scores.items():
            out[b, i, h * d : (h + 1) * d] += math.exp(s) / total * np.array(v[j][h * d : (h + 1) * d])
    return out


@every_case
def test_apply_equals_scalar_loops(case: str) -> None:
    problem = make(**CASES[case])
    y = random_like(problem)
    np.testing.assert_allclose(oracle.apply(problem, y), scalar_apply(problem, y), rtol=1e-12, atol=1e-13)


def test_rows_that_see_nothing_are_zero() -> None:
    problem = make(mask=True)
    assert problem.mask is not None
    hidden = replace(problem, mask=None, score_bias=np.where(problem.mask, -np.inf, 0.0)[:, None])
    y = random_like(problem)
    assert not oracle.apply(problem, y)[0, 1].any()
    assert not oracle.gradient(hidden, y, y)["score_bias"][0, 0, 1].any()
    np.testing.assert_array_equal(oracle.apply(problem, y), oracle.apply(hidden, y))


def test_seed_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    p = make(gain=1.5)
    x, omega_q, w_k, omega_v = (torch.tensor(a, requires_grad=True) for a in (p.x, p.omega_q, p.w_k, p.omega_v))
    k, v = x @ w_k.T, x @ omega_v.T
    y = v.clone()
    for _ in range(4):
        q = y @ omega_q.T
        y = torch.softmax(torch.matmul(k, q.transpose(-2, -1)) / (x.shape[-1] ** 0.5), dim=-1) @ v
    y.backward(torch.tensor(random_like(p)))
    assert p.omega_v is not None
    got, history = oracle.seed_forward(p.x, p.omega_q, p.w_k, p.omega_v, 4)
    np.testing.assert_allclose(got, y.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(oracle.picard(p, 4), got, rtol=1e-13, atol=1e-14)
    assert len(history) == 5
    grads = oracle.seed_backward(p.x, p.omega_q, p.w_k, p.omega_v, 4, random_like(p))
    for name, t in dict(x=x, omega_q=omega_q, w_k=w_k, omega_v=omega_v).items():
        np.testing.assert_allclose(grads[name], t.grad.numpy(), rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("n_iters", [0, 1, 3, 10])
def test_seed_backward_equals_complex_step(n_iters: int) -> None:
    p = make(gain=1.5)
    assert p.omega_v is not None
    arrays: dict[str, Array] = dict(x=p.x, omega_q=p.omega_q, w_k=p.w_k, omega_v=p.omega_v)
    grads = oracle.seed_backward(**arrays, n_iters=n_iters, grad_y=random_like(p))
    for name, a in arrays.items():
        for index in np.ndindex(*a.shape):
            moved = a.astype(complex)
            moved[index] += 1j * STEP
            slope = oracle.seed_forward(**(arrays | {name: moved}), n_iters=n_iters)[0].imag / STEP
            assert grads[name][index] == pytest.approx((slope * random_like(p)).sum(), rel=1e-11, abs=1e-13)


@every_case
def test_jacobian_equals_central_differences(case: str) -> None:
    problem = make(**CASES[case])
    y, e = random_like(problem), random_like(problem, seed=8)
    step = (oracle.apply(problem, y + 1e-5 * e) - oracle.apply(problem, y - 1e-5 * e)) / 2e-5
    for b in range(len(y)):
        product = oracle.jacobian(problem, b, y) @ e[b].ravel()
        np.testing.assert_allclose(product, step[b].ravel(), rtol=1e-6, atol=1e-8)


@every_case
def test_solve_is_the_picard_limit(case: str) -> None:
    problem = make(gain=0.7, **CASES[case])
    y = oracle.solve(problem)
    assert np.abs(oracle.apply(problem, y) - y).max() < 1e-12
    cool = replace(problem, scale=0.03)  # else the norm, steep near q = 0, can make Picard cycle
    np.testing.assert_allclose(oracle.solve(cool), oracle.picard(cool, 300), atol=1e-11)


@every_case
def test_gradient_equals_differences_of_solve(case: str) -> None:
    problem = make(b=2, n=3, **CASES[case])
    grad_y = random_like(problem)
    y = oracle.solve(problem)
    grads = oracle.gradient(problem, y, grad_y)
    arrays = {name: a for name, a in vars(problem).items() if isinstance(a, np.ndarray) and name != "mask"}
    assert grads.keys() == arrays.keys()
    for name, a in arrays.items():
        e = np.random.default_rng(3).normal(size=a.shape)
        plus, minus = (oracle.solve(vary(problem, name, a + s * 1e-5 * e), start=y) for s in (1, -1))
        numeric = ((plus - minus) * grad_y).sum() / 2e-5
        assert (grads[name] * e).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("gain", [0.7, 3.0])
@pytest.mark.parametrize("case", [c for c in CASES if "causal" in c])
def test_rows_solve_the_whole(case: str, gain: float) -> None:
    problem = make(gain=gain, **CASES[case])
    y = oracle.solve_rows(problem)
    np.testing.assert_allclose(oracle.apply(problem, y), y, atol=1e-11)
    if gain < 1:
        np.testing.assert_allclose(y, oracle.solve(problem), atol=1e-11)


def test_explicit_diagonal_is_nilpotent() -> None:
    problem = make(gain=5.0, **CASES["causal-input"])
    y = oracle.picard(problem, problem.x.shape[1])
    np.testing.assert_allclose(y, oracle.solve_rows(problem), atol=1e-12)
    assert np.abs(np.linalg.matrix_power(oracle.jacobian(problem, 0, y), 5)).max() < 1e-9


@pytest.mark.parametrize("beta", [-40.0, -3.0, 3.9, 4.1, 6.0, 12.0, 50.0])
def test_largest_root_equals_a_scan(beta: float) -> None:
    for c in np.linspace(-abs(beta) - 6, 6, 37).tolist():

        def g(p: Array, c: float = c) -> Array:
            return p - sigmoid(c + beta * p)

        p = largest_root(c, beta)
        assert abs(g(np.array(p))) < 1e-14 * (1 + abs(beta))
        assert p == pytest.approx(scanned_root(g), abs=1e-12)


def test_known_roots() -> None:
    assert largest_root(3.5, -10.0) == pytest.approx(0.393, abs=5e-4)
    assert largest_root(-3.0, 6.0) == pytest.approx(0.929, abs=5e-4)


@pytest.mark.parametrize("seed", range(4))
def test_curve_arrives_on_adversarial_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alpha, beta = 5 * rng.normal(size=8), 10 * rng.normal(size=(8, 8))

    def f(p: Array) -> Array:
        return sigmoid(alpha + p @ beta.T)

    for p in (follow_curve(f, np.ones(8), 1e-13), newton(f, np.ones(8), 1e-13)):
        assert p is None or np.abs(f(p) - p).max() < 1e-12


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="context needs"):
        make(m=3)
    with pytest.raises(ValueError, match="self_query"):
        make(self_query="input")
    with pytest.raises(ValueError, match="x must be float64"):
        replace(make(), x=make().x.astype(np.float32))
