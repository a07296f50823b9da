"""The loop and every solver: the same equilibrium, each system for itself, and what a Solution says."""

import itertools
from dataclasses import replace

import pytest
import torch

from implicit_attention import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    NewtonKrylov,
    Picard,
    fixed_point,
)
from implicit_attention.equilibrium.solvers import base, solve
from implicit_attention.errors import NonFiniteError
from tests import oracle
from tests.bridge import array, close, make_layer, problem_of

SOLVERS = {
    "picard": Picard(max_steps=500),
    "damped": Picard(damping=0.6, max_steps=500),
    "anderson": Anderson(max_steps=500),
    "anderson-1": Anderson(memory=1, mixing=0.7, max_steps=500),
    "broyden": Broyden(max_steps=500),
    "broyden-3": Broyden(memory=3, max_steps=500),
    "newton": NewtonKrylov(),
    "newton-restarted": NewtonKrylov(restart=3, cycles=2),
}
LAYERS = {
    "seed": {},
    "heads": {"num_heads": 2, "positions": "relative"},
    "qk_norm": {"num_heads": 2, "qk_norm": True, "query_input": True},
    "causal": {"num_heads": 2, "is_causal": True},
    "causal-input": {"num_heads": 2, "is_causal": True, "self_query": "input"},
    "keys": {"num_heads": 2, "normalize_over": "keys", "query_input": True},
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
one_of_each = pytest.mark.parametrize(
    "solver", [SOLVERS[k] for k in ("picard", "anderson", "broyden", "newton")], ids=str
)


def cosines(y, a):
    """Contracts where |a| < 1."""
    return torch.cos(a * y)


def lines(y, a, b):
    return a * y + b


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@each_solver
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_all_reach_the_same_equilibrium(options, solver):
    layer = make_layer(8, gain=0.5, solver=solver, **options)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    solution = layer.solve(x)
    close(solution.value, oracle.solve(problem_of(layer, x)), 1e-9)
    assert bool(solution.converged.all())


@each_solver
@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (3,)), ({"is_causal": True}, (3, 7)), ({"normalize_over": "keys"}, (3, 7))],
    ids=["seed", "causal", "keys"],
)
def test_what_a_solution_says(options, shape, solver):
    layer = make_layer(8, 2, gain=0.5, solver=solver, **options)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    solution = layer.solve(x, history=True)
    steps = int(solution.steps.max())
    assert solution.value.shape == x.shape
    assert {t.shape for t in (solution.residual, solution.steps, solution.converged)} == {shape}
    assert solution.abs_trace.shape == solution.rel_trace.shape == (steps + 1, *shape)
    assert len(solution.history) == steps + 1
    assert torch.equal(solution.history[-1], solution.value)
    assert solution.evaluations >= steps + 1
    assert solution.steps.dtype == torch.long
    assert solution.converged.dtype == torch.bool
    assert set(solution.stats) == {"abs_trace", "rel_trace", "nstep", "evaluations"}
    # The residual is that of the value returned, and the traces are those of the iterates.
    equation, problem = layer.equation(x), problem_of(layer, x)
    assert torch.equal(solution.history[0], equation.start)
    for y, absolute, relative in zip(solution.history, solution.abs_trace, solution.rel_trace, strict=True):
        f = torch.from_numpy(oracle.apply(problem, array(y)))
        residual, size = ((t.abs().flatten(len(shape)).amax(-1)) for t in (f - y, f))
        close(absolute, array(residual), 1e-13)
        close(relative, array(residual / size), 1e-11)
    close(solution.residual, array(residual), 1e-14)


@each_solver
def test_a_sample_is_the_same_alone_and_in_a_batch(solver):
    """Samples of very different difficulty: each stops for itself and is frozen then."""
    a, b = column(0.0, 0.1, 0.5, 0.9, 0.95), column(1.0, -2.0, 0.3, 1.0, 1.0)
    y0 = torch.ones(5, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def function(y, a, b):
        return a * torch.cos(y) * y.roll(1, -1) + b

    together = fixed_point(function, y0, (a, b), solver=solver, on_failure="ignore")
    assert len(set(together.steps.tolist())) > 1
    for i in range(5):
        alone = fixed_point(function, y0[i : i + 1], (a[i : i + 1], b[i : i + 1]), solver=solver, on_failure="ignore")
        close(together.value[i], array(alone.value[0]), 1e-13)
        assert together.steps[i] == alone.steps[0]
        assert together.converged[i] == alone.converged[0]


@pytest.mark.parametrize("options", [{}, {"normalize_over": "keys"}], ids=["seed", "keys"])
@one_of_each
def test_a_layers_system_is_the_same_alone_and_in_a_batch(options, solver):
    layer = make_layer(8, 2, solver=solver, **options)
    x = torch.randn(3, 6, 8, dtype=torch.float64) * torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    together = layer.solve(x)
    for i in range(3):
        alone = layer.solve(x[i])
        close(together.value[i], array(alone.value), 1e-12)
        assert torch.equal(together.steps[i], alone.steps)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_diverging_sample_hurts_nobody_and_is_not_called_solved(solver, dtype):
    """`y = y^2 + 1` has no real solution; plain iteration overflows."""
    a, solver = column(1.0, 0.0, 0.1).to(dtype), replace(solver, max_steps=100)
    solution = fixed_point(
        lambda y, a: a * y * y + 1, torch.ones(3, 2, dtype=dtype), (a,), solver=solver, on_failure="ignore"
    )
    assert solution.converged.tolist() == [False, True, True]
    expected = column(1.0, (1 - 0.6**0.5) / 0.2).expand(2, 2)  # roots of a y^2 - y + 1
    close(solution.value[1:], array(expected), 1e-9 if dtype == torch.float64 else 1e-4)
    assert bool(solution.value.isfinite().all())
    assert bool(solution.residual.isfinite().all())


@pytest.mark.parametrize("steps", [5, 30, 200, 2000])
def test_growth_does_not_count_as_convergence(steps):
    """The tolerance grows with F(y): it must be that of the iterate which is returned."""
    solution = fixed_point(
        lines, column(1.0), (column(-2.4), column(1.0)), solver=Picard(max_steps=steps), on_failure="ignore"
    )
    assert not bool(solution.converged)
    assert float(solution.residual) == pytest.approx(2.4)  # that of the start, |-2.4 + 1 - 1|
    assert float(solution.value) == 1.0


@each_solver
def test_failure_returns_the_best_iterate(solver):
    solver = replace(solver, max_steps=3, rtol=1e-16, atol=1e-16)
    a = column(-1.8, 0.95, 2.5)
    y0 = torch.randn(3, 4, dtype=torch.float64)
    solution = fixed_point(lambda y, a: torch.sin(a * y + y.roll(1, -1)), y0, (a,), solver=solver, on_failure="ignore")
    assert not bool(solution.converged.any())
    assert torch.equal(solution.residual, solution.abs_trace.amin(0))
    expected = torch.sin(a * solution.value + solution.value.roll(1, -1)) - solution.value
    close(expected.abs().amax(-1), array(solution.residual), 1e-14)
    assert solution.steps.tolist() == [3, 3, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@one_of_each
def test_non_finite_start_is_an_error(solver, bad):
    y0 = torch.ones(2, 3, dtype=torch.float64)
    y0[1, 2] = bad
    with pytest.raises(NonFiniteError):
        fixed_point(lines, y0, (column(0.5, 0.5), column(1.0, 1.0)), solver=solver)


@one_of_each
def test_nothing_to_do(solver):
    a = column(0.5, 0.25)
    solved = fixed_point(lines, column(2.0, 4.0), (a, column(1.0, 3.0)), solver=solver)
    assert solved.steps.tolist() == [0, 0]
    assert solved.evaluations == 1
    empty = fixed_point(cosines, torch.zeros(0, 3, dtype=torch.float64), (a[:0],), solver=solver)
    assert empty.value.shape == (0, 3)
    assert empty.converged.shape == (0,)


@one_of_each
@pytest.mark.parametrize("system_ndim", [1, 2, 3])
def test_systems_of_any_number_of_dimensions(solver, system_ndim):
    a = torch.rand(2, 3, 4, dtype=torch.float64)
    solution = fixed_point(cosines, torch.zeros_like(a), (a,), solver=solver, system_ndim=system_ndim)
    assert solution.steps.shape == solution.residual.shape == a.shape[:system_ndim]
    close(torch.cos(a * solution.value), array(solution.value), 1e-9)


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_default_tolerance_follows_the_dtype(dtype, tol):
    """`y = 0.9 y + 1`: it stops at the first iterate within `tol (1 + max|F|)`, and not before."""
    args = (torch.tensor([[0.9]], dtype=dtype), torch.ones(1, 1, dtype=dtype))
    solution = fixed_point(lines, torch.zeros(1, 1, dtype=dtype), args, solver=Picard(max_steps=1000))
    assert solution.value.dtype == dtype
    trace, sizes = (array(t[:, 0]) for t in (solution.abs_trace, solution.abs_trace / solution.rel_trace))
    within = trace <= tol * (1 + sizes)
    assert bool(within[-1])
    assert not within[:-1].any()


def test_both_tolerances_count():
    args = (column(0.9), column(1.0))
    for rtol, atol in itertools.product([1e-2, 1e-12], repeat=2):
        solution = fixed_point(lines, column(0.0), args, solver=Picard(rtol=rtol, atol=atol, max_steps=1000))
        before, last = solution.abs_trace[-2:, 0].tolist()
        assert last <= atol + rtol * 10.0
        assert before > atol + rtol * 9.9 * (1 - before)


def test_failures_are_warned_about_once_raised_or_ignored():
    args, solver = (column(3.0, 0.5), column(1.0, 1.0)), Picard(max_steps=5)
    with pytest.warns(ConvergenceWarning, match=r"1 of 2 systems .* after 5 steps") as caught:
        fixed_point(lines, column(1.0, 2.0), args, solver=solver)
    assert len(caught) == 1
    with pytest.raises(ConvergenceError, match="equilibrium was not solved"):
        fixed_point(lines, column(1.0, 2.0), args, solver=solver, on_failure="raise")
    assert not fixed_point(lines, column(1.0, 2.0), args, solver=solver, on_failure="ignore").converged.all()


@pytest.mark.parametrize("columns", ["equal", "zero", "parallel", "tiny", "huge"])
def test_anderson_is_never_singular(columns):
    state_y = torch.randn(5, 2, 6, dtype=torch.float64)
    dr = {
        "equal": state_y[:1].expand(5, -1, -1),
        "zero": torch.zeros_like(state_y),
        "parallel": state_y[:1] * torch.arange(1.0, 6.0)[:, None, None],
        "tiny": state_y * 1e-200,
        "huge": state_y * 1e100,
    }[columns]
    residual = torch.randn(2, 6, dtype=torch.float64)
    gamma = Anderson()._weights(dr, residual)
    assert bool(gamma.isfinite().all())
    corrected = residual - torch.einsum("msn,sm->sn", dr, gamma)
    longer = torch.linalg.vector_norm(corrected, dim=-1) / torch.linalg.vector_norm(residual, dim=-1)
    assert bool((longer <= 1 + 1e-12).all())


@pytest.mark.parametrize("solver", [Anderson(), Anderson(memory=10), Broyden()], ids=str)
def test_constant_residuals_do_no_harm(solver):
    """`F(y) = y + 1`: every residual is the same and every difference zero."""
    solution = fixed_point(lambda y: y + 1, torch.zeros(2, 3, dtype=torch.float64), solver=solver, on_failure="ignore")
    assert bool(solution.value.isfinite().all())
    assert not bool(solution.converged.any())


def test_anderson_and_broyden_solve_affine_maps_in_few_steps():
    """On n unknowns, n + 1 steps and a few for rounding, although the plain iteration diverges."""
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(column(-1.5, 0.5, 0.2, -0.3)[:, 0]) @ basis.mT
    b = torch.randn(3, 4, dtype=torch.float64)
    expected = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, b.mT).mT
    for solver in (Anderson(memory=6, max_steps=100), Broyden(max_steps=100), NewtonKrylov()):
        solution = solve(solver, lambda y: y @ matrix.mT + b, torch.zeros_like(b), linear=True)
        assert bool(solution.converged.all()), solver
        close(solution.value, array(expected), 1e-8)


def test_row_convergence_is_that_of_rows():
    layer = make_layer(8, is_causal=True, solver=Picard(max_steps=3), on_failure="ignore")
    solution = layer.solve(torch.randn(1, 9, 8, dtype=torch.float64))
    assert bool(solution.converged[0, 0])  # sees itself alone: settled at the start
    assert int(solution.steps[0, 0]) == 0
    assert not bool(solution.converged.all())


def test_loop_refuses_the_first_iterate_only():
    """NaN that comes later is a failure of that system, not an error."""

    def later(y):
        return torch.where(y > 3, torch.nan, y + 1)

    solution = solve(Picard(), later, column(0.0, 0.5))
    assert not bool(solution.converged.any())
    assert bool(solution.value.isfinite().all())
    assert isinstance(solution, base.Solution)


@pytest.mark.parametrize("look", [3, 7])
@pytest.mark.parametrize("name", SOLVERS)
def test_looking_now_and_then_changes_nothing(name, look, monkeypatch):
    """As on a device that would have to be waited for: one system converges early, one late, one overflows."""
    solver = replace(SOLVERS[name], max_steps=200)
    gain = torch.tensor([0.1, 0.8, 0.5], dtype=torch.float64)[:, None]

    def function(y):
        far = y.abs().amax(-1, keepdim=True) > 1.5
        late = torch.where(far & (torch.arange(3)[:, None] == 2), torch.inf, 1.0)
        return late * (gain * torch.cos(y + torch.arange(5)) + 1.0)

    def found():
        return solve(solver, function, torch.zeros(3, 5, dtype=torch.float64), history=True)

    every = found()
    monkeypatch.setattr(base, "looks_every", lambda device: look)
    seldom = found()
    for field in ("value", "residual", "steps", "converged", "abs_trace", "rel_trace"):
        assert torch.equal(getattr(every, field).nan_to_num(), getattr(seldom, field).nan_to_num()), field
    assert len(every.history) == len(seldom.history) == len(every.abs_trace)
    assert every.converged.tolist()[:2] == [True, True]
