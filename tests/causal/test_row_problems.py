"""Two equations of a single row, embedded as causal layers, and who can solve them.

`p = sigmoid(3.5 - 10 p)` has one root, 0.393, which repels Picard's iteration; `p = sigmoid(-3 + 6 p)` has stable
roots near 0.071 and 0.929, of which the seed's start p = 1 leads to the second.
"""

import numpy as np
import pytest
import torch

from implicit_attention import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Picard,
    fixed_point,
)
from tests import oracle
from tests.bridge import array, close, make_layer, problem_of
from tests.causal.oracle_roots import bisect, largest_root, scanned_root, sigmoid

REPELLING, THREE_ROOTS = (3.5, -10.0), (-3.0, 6.0)
SOLVERS = {
    "newton": NewtonKrylov(),
    "damped": Picard(damping=0.3, max_steps=200),  # below 2 / (1 + 2.39), 2.39 = 10 p (1 - p)
    "anderson": Anderson(max_steps=200),
    "broyden": Broyden(max_steps=200),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
X = torch.eye(2, dtype=torch.float64)[None]  # the tokens are the two unit vectors


def make(c, beta, solver, **options):
    """With v_0 = e_0, v_1 = k_1 = e_1, row 1 is y_1 = (1 - p, p), p = sigmoid(c + beta p).

    Its two scores differ by k_1 . (Omega_Q (y_1 - y_0) + W_Q (x_1 - x_0)) = beta p + c.
    """
    layer = ImplicitQueryAttention(
        2, is_causal=True, query_input=True, scale=1.0, solver=solver, dtype=torch.float64, **options
    )
    with torch.no_grad():
        layer.W_K.weight.copy_(torch.eye(2))
        layer.Omega_V.weight.copy_(torch.eye(2))
        layer.Omega_Q.weight.copy_(torch.diag(torch.tensor([0.0, beta])))
        layer.W_Q.weight.copy_(torch.diag(torch.tensor([0.0, c])))
    return layer


def weight_of_self(y):
    return float(y[0, 1, 1].detach())


@pytest.mark.parametrize(("c", "beta"), [REPELLING, THREE_ROOTS], ids=["repelling", "three-roots"])
def test_the_layer_is_the_row_problem(c, beta):
    layer = make(c, beta, NewtonKrylov())
    function, args, start = layer.equation(X)
    assert weight_of_self(start) == 1.0
    for p in np.linspace(0, 1, 11):
        y = torch.tensor([[[1.0, 0.0], [1 - p, p]]], dtype=torch.float64)
        q = sigmoid(np.array(c + beta * p))
        expected = np.array([[[1.0, 0.0], [1 - q, q]]])
        close(function(y, *args), expected, 1e-14)
        close(torch.from_numpy(oracle.apply(problem_of(layer, X), array(y))), expected, 1e-14)


def test_known_roots():
    assert largest_root(*REPELLING) == pytest.approx(0.393, abs=5e-4)
    assert largest_root(*THREE_ROOTS) == pytest.approx(0.929, abs=5e-4)


def test_picard_cycles_and_says_so():
    layer = make(*REPELLING, Picard(max_steps=100))
    with pytest.warns(ConvergenceWarning, match="equilibrium was not solved: 1 of 2 systems"):
        solution = layer.solve(X, history=True)
    assert solution.converged.tolist() == [[True, False]]  # row 0 sees itself alone
    assert sorted(weight_of_self(y) for y in solution.history[-2:]) == pytest.approx([0.002, 0.970], abs=2e-3)
    with pytest.raises(ConvergenceError, match="NewtonKrylov"):
        make(*REPELLING, Picard(), on_failure="raise")(X)


@each_solver
def test_others_find_the_root_that_repels(solver):
    layer = make(*REPELLING, solver, on_failure="raise")
    y = layer(X)
    assert weight_of_self(y) == pytest.approx(largest_root(*REPELLING), abs=1e-9)
    close(y, oracle.solve_rows(problem_of(layer, X)), 1e-9)


@each_solver
def test_three_roots_are_solved_and_the_solution_is_one_of_them(solver):
    y = make(*THREE_ROOTS, solver, on_failure="raise")(X)
    p = weight_of_self(y)
    assert float(sigmoid(np.array(-3.0 + 6.0 * p))) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize(
    "solver", [Picard(max_steps=100), SOLVERS["damped"], NewtonKrylov()], ids=["picard", "damped", "newton"]
)
def test_three_roots_lead_to_the_one_reached_from_the_values(solver):
    assert weight_of_self(make(*THREE_ROOTS, solver, on_failure="raise")(X)) == pytest.approx(
        scanned_root(lambda p: p - sigmoid(-3.0 + 6.0 * p)), abs=1e-9
    )


def test_another_start_leads_to_another_root():
    function, args, start = make(*THREE_ROOTS, NewtonKrylov()).equation(X)
    low = start.clone()
    low[0, 1] = torch.tensor([1.0, 0.0])
    y = fixed_point(function, low, args, solver=Picard(max_steps=100), on_failure="raise").value
    lowest = bisect(lambda p: p - float(sigmoid(np.array(-3.0 + 6.0 * p))), 0.0, 0.2)
    assert weight_of_self(y) == pytest.approx(lowest, abs=1e-9)
    assert lowest == pytest.approx(0.071, abs=5e-4)


@pytest.mark.parametrize(("c", "beta"), [REPELLING, THREE_ROOTS], ids=["repelling", "three-roots"])
def test_gradient_at_the_root(c, beta):
    """d p / d c = s / (1 - beta s), s = p (1 - p), although the adjoint does not contract either."""
    layer = make(c, beta, NewtonKrylov(), adjoint=Implicit(NewtonKrylov()), on_failure="raise")
    y = layer(X)
    y[0, 1, 1].backward()
    p = weight_of_self(y)
    s = p * (1 - p)
    assert float(layer.W_Q.weight.grad[1, 1]) == pytest.approx(s / (1 - beta * s), rel=1e-8)
    assert float(layer.Omega_Q.weight.grad[1, 1]) == pytest.approx(p * s / (1 - beta * s), rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qk_norm": True, "num_heads": 1}], ids=str)
def test_hard_layers_find_the_roots_of_the_oracle(options):
    """Several heads, or a norm: row by row, the oracle takes Picard's root, else damped Newton's, else the curve's."""
    layer = make_layer(8, is_causal=True, gain=10.0, solver="auto", **({"num_heads": 2} | options))
    if layer.temperature is not None:
        torch.nn.init.constant_(layer.temperature, 4.0)
    x = torch.randn(2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = layer.solve(x)
    assert bool(found.converged.all())
    close(found.value, oracle.solve_rows(problem_of(layer, x)), 1e-9)


def test_a_failing_adjoint_is_reported_too():
    layer = make(*REPELLING, NewtonKrylov(), adjoint=Implicit(Picard(max_steps=30)))
    y = layer(X)
    with pytest.warns(ConvergenceWarning, match="adjoint equation was not solved"):
        y[0, 1, 1].backward()
