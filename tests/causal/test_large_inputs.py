"""Inputs of a run that diverges: bounded work, then a report. Work is counted, not timed."""

import warnings

import pytest
import torch

from implicit_attention import ConvergenceWarning, ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal import curve, diagonal, own_roots, rows
from implicit_attention.causal.rows import solve_rows
from tests.causal.row_batches import function, joined, linear, make, single


@pytest.fixture
def work(monkeypatch):
    """Counts blocks, sweeps, rounds of the row solver, and steps along curves."""
    counts = {"blocks": 0, "sweeps": 0, "rounds": 0, "steps": 0}
    settle, solve, step = diagonal.BlockSolver.settle, own_roots.solve_rows, curve._step

    def settled(self, *args):
        block = settle(self, *args)
        counts["blocks"] += 1
        counts["sweeps"] += block.sweeps
        return block

    def solved(*args, **options):
        counts["rounds"] += 1
        return solve(*args, **options)

    def stepped(*args):
        counts["steps"] += 1
        return step(*args)

    monkeypatch.setattr(diagonal.BlockSolver, "settle", settled)
    monkeypatch.setattr(own_roots, "solve_rows", solved)
    monkeypatch.setattr(curve, "_step", stepped)
    return counts


def layer_and_input(factor, dtype=torch.float32, **options):
    torch.manual_seed(0)
    solver = ForwardSubstitution(kernel="torch")
    layer = ImplicitQueryAttention(32, 4, is_causal=True, solver=solver, **options).to(dtype)
    return layer, factor * torch.randn(2, 33, 32, dtype=dtype)


@pytest.mark.parametrize("factor", [100.0, 1e3, 1e6], ids="{:g}".format)
@pytest.mark.parametrize("heads", [4, 1])
def test_work_is_bounded_and_what_is_not_solved_is_said(work, factor, heads):
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(32, heads, is_causal=True, solver=ForwardSubstitution(kernel="torch"))
    x = (factor * torch.randn(2, 33, 32)).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = layer.solve(x)
        solution.value.square().sum().backward()
    assert work["blocks"] == 1, "no block is tried again and again, in ever smaller parts"
    assert work["sweeps"] <= 2 * diagonal.MOST_SWEEPS
    assert work["rounds"] <= 2 * work["sweeps"]
    assert work["steps"] == 0
    assert not bool(solution.converged.all())
    assert float(solution.converged.float().mean()) > 0.3
    assert any(w.category is ConvergenceWarning for w in caught)
    adjoint = layer.last_solve.adjoint
    assert int(adjoint.steps.max()) <= 3 * 33 + diagonal.MOST_SWEEPS
    assert bool(adjoint.converged.all()) == bool(torch.isfinite(layer.W_K.weight.grad).all()), "NaN is never silent"


def test_rows_that_can_be_solved_still_are(work):
    """Scores of hundreds of nats: hard, but within what the precision can hold."""
    layer, x = layer_and_input(10.0, on_failure="raise")
    layer(x)
    assert work["blocks"] == 1
    assert work["steps"] < 33 * 40
    layer, x = layer_and_input(100.0, torch.float64, on_failure="raise")
    layer(x)


def test_ordinary_inputs_cost_what_they_did(work):
    layer, x = layer_and_input(1.0, on_failure="raise")
    layer(x)
    assert work == {"blocks": 1, "sweeps": 5, "rounds": 0, "steps": 0}


def test_values_of_any_size_are_solved_to_their_own_tolerance():
    """The error of a weight counts times the distance from the others' mean to the own value."""
    layer, x = layer_and_input(1.0, qk_norm=True, values="identity", on_failure="raise")
    with torch.no_grad():
        layer.temperature.fill_(4.0)
    layer(1e4 * x)


# The row solver


def huge(count=400, heads=4, size=1e5):
    return single(linear(count, heads, size, seed=3))


def test_lost_rows_get_what_plain_iteration_settles_at(work):
    problem = huge()
    found = solve_rows(problem, 1e-5)
    assert work["steps"] == 0
    p = torch.ones(400, 4, dtype=torch.float64)
    wide = problem.double()
    for _ in range(rows._PLAIN_STEPS):
        p = wide.target(p)
    settles = (wide.target(p) - p).abs().amax(-1) == 0
    assert 100 < int(settles.sum()) < 400
    assert bool(found.solved[settles].all())
    picard = rows._settle(wide, 1e-12)[1] <= 1e-12
    newton = rows._damped_newton(wide, 1e-12)[1] <= 1e-12
    only = settles & ~picard & ~newton
    assert bool(only.any())
    torch.testing.assert_close(found.p[only], p[only].float(), rtol=0, atol=0)


def test_a_row_is_lost_by_its_own_scores_alone():
    """Whatever else is in the batch, small rows still get the curve's root."""
    small = single(make(False, 60, 4, 20.0, seed=2))
    whole = solve_rows(joined(small, huge(60)), 1e-5)
    alone = solve_rows(small, 1e-5)
    assert bool(alone.solved.all())
    torch.testing.assert_close(whole.p[:60], alone.p, rtol=0, atol=1e-6)
    left = (~solve_rows(huge(60), 1e-5).solved).nonzero()[:, 0]
    f = function(huge(60).double(), int(left[0]))
    assert abs(f(alone.p[:1].double().numpy())).max() <= 1.0  # a problem like any other, only not solved


def test_a_root_as_good_as_rounding_allows_says_so():
    problem = single(linear(300, 4, 300.0, seed=5))
    found = solve_rows(problem, 1e-9)
    rounding = problem.rounding(found.p)
    assert torch.equal(found.exact, found.residual <= rounding)
    assert float(found.exact.float().mean()) > 0.9
    again = solve_rows(problem, 1e-9, torch.where(found.exact[:, None], found.p, torch.nan), thorough=False)
    assert bool(again.exact[found.exact].all()), "and is kept"
