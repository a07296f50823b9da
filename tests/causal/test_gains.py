"""The row problem's Jacobian and its spectral radius, against the complex step and NumPy's eigenvalues."""

import numpy as np
import pytest
import torch

from implicit_attention.causal.forward_substitution import radius
from implicit_attention.causal.rows import RowProblem, gains, solve_rows
from tests.causal.oracle_roots import complex_step
from tests.causal.row_batches import F64, function, linear, make

each_kind = pytest.mark.parametrize("normed", [False, True], ids=["linear", "normed"])


@each_kind
def test_the_jacobian(normed):
    problem = make(normed, 6, 3, 2.0)
    p = torch.rand(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    target, jacobian = problem.linearize(p)
    for row in range(6):
        f = function(problem, row)
        np.testing.assert_allclose(target[row], f(p[row : row + 1].numpy())[0], atol=1e-14)
        np.testing.assert_allclose(jacobian[row], complex_step(f, p[row].numpy()), atol=1e-13)
    torch.testing.assert_close(torch.sigmoid(problem.score(p) + problem.offset), target)


@each_kind
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_gains_are_spectral_radii(heads, normed):
    problem = make(normed, 200, heads, 6.0)
    p = solve_rows(problem, 1e-12).p
    expected = np.abs(np.linalg.eigvals(problem.linearize(p)[1].numpy())).max(-1)
    np.testing.assert_allclose(gains(problem, p), expected, rtol=5e-6, atol=1e-12)


def test_gains_at_the_edge():
    zero, nilpotent = torch.zeros(2, 2), torch.tensor([[0.0, 8.0], [0.0, 0.0]])
    rotation = torch.tensor([[0.0, 8.0], [-2.0, 0.0]])  # eigenvalues +-4i
    beta = torch.stack([zero, nilpotent, rotation, torch.full((2, 2), torch.nan)]).double()
    problem = RowProblem(torch.zeros(4, 2, dtype=F64), beta.requires_grad_(), torch.zeros(4, 2, dtype=F64))
    radius = gains(problem, torch.zeros(4, 2, dtype=F64))  # the sigmoid's slope is 1/4
    np.testing.assert_allclose(radius.detach(), [0, 0, 1, np.nan], atol=1e-6)
    (grad,) = torch.autograd.grad(radius[:3].sum(), beta)
    assert bool(grad[:3].isfinite().all())


def test_gains_can_be_differentiated():
    problem = linear(5, 3, 2.0)
    p = torch.rand(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))

    def radius(alpha, beta, p):
        return gains(RowProblem(alpha, beta, problem.offset), p)

    leaves = [t.clone().requires_grad_() for t in (problem.alpha, problem.beta, p)]
    assert torch.autograd.gradcheck(radius, leaves, eps=1e-6, atol=1e-4)


def test_gains_where_eigenvalues_do_not_converge(monkeypatch):
    def fails(matrices):
        raise torch.linalg.LinAlgError("no convergence")

    matrices = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = radius(matrices)
    monkeypatch.setattr(torch.linalg, "eigvals", fails)
    torch.testing.assert_close(radius(matrices), expected, rtol=1e-5, atol=0.0)
