"""GMRES and the power iteration against dense linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.equilibrium.linear import gmres, largest, spectral_radius
from tests.bridge import array, close


def product(matrices):
    return lambda t: torch.einsum("sij,sj->si", matrices, t)


def residual(matrices, x, b):
    return torch.linalg.vector_norm(b - product(matrices)(x), dim=-1)


@pytest.mark.parametrize(("restart", "cycles"), [(12, 1), (5, 200), (30, 4)], ids=["full", "restarted", "roomy"])
def test_gmres_equals_a_direct_solve(restart, cycles):
    matrices = torch.eye(12, dtype=torch.float64) + 0.2 * torch.randn(6, 12, 12, dtype=torch.float64)
    b = torch.randn(6, 12, dtype=torch.float64)
    x, norm = gmres(product(matrices), b, rtol=1e-13, restart=restart, cycles=cycles)
    # Residuals of 1e-13 |b| move x by the condition number times as much.
    close(x, array(torch.linalg.solve(matrices, b)), 1e-12 * float(torch.linalg.cond(matrices).max()))
    assert bool((norm <= 1e-13 * torch.linalg.vector_norm(b, dim=-1)).all())


def test_gmres_reports_the_true_residual_when_it_stops_early():
    matrices = torch.randn(4, 20, 20, dtype=torch.float64)
    b = torch.randn(4, 20, dtype=torch.float64)
    for restart, cycles in ((3, 1), (4, 3)):
        x, norm = gmres(product(matrices), b, rtol=1e-13, restart=restart, cycles=cycles)
        close(norm, array(residual(matrices, x, b)), 1e-12)
        assert bool((norm <= torch.linalg.vector_norm(b, dim=-1)).all())


def test_each_system_has_a_tolerance_of_its_own():
    matrices = torch.eye(30, dtype=torch.float64) + 0.1 * torch.randn(2, 30, 30, dtype=torch.float64)
    b = torch.randn(2, 30, dtype=torch.float64)
    rtol = torch.tensor([1e-2, 1e-10], dtype=torch.float64)
    x, _ = gmres(product(matrices), b, rtol=rtol, restart=30, cycles=2)
    assert bool((residual(matrices, x, b) <= rtol * torch.linalg.vector_norm(b, dim=-1) * (1 + 1e-6)).all())


def test_systems_do_not_disturb_each_other():
    """Zero, one and many Krylov directions side by side: each result is what it is alone."""
    matrices = torch.stack([torch.eye(8), 2 * torch.eye(8), torch.randn(8, 8), torch.diag(torch.arange(1.0, 9.0))])
    matrices = matrices.double()
    b = torch.randn(4, 8, dtype=torch.float64)
    b[0] = 0.0
    together, _ = gmres(product(matrices), b, rtol=1e-12, restart=8, cycles=3)
    for i in range(4):
        alone, _ = gmres(product(matrices[i : i + 1]), b[i : i + 1], rtol=1e-12, restart=8, cycles=3)
        close(together[i : i + 1], array(alone), 1e-9)
    assert bool((together[0] == 0).all())


@pytest.mark.parametrize("rank", [1, 2, 3], ids=lambda r: f"rank{r}")
def test_happy_breakdown(rank):
    """The identity plus a matrix of low rank: the Krylov space is exhausted after rank + 1 products."""
    left, right = torch.randn(3, 10, rank, dtype=torch.float64), torch.randn(3, 10, rank, dtype=torch.float64)
    matrices = torch.eye(10, dtype=torch.float64) + left @ right.mT
    b, calls = torch.randn(3, 10, dtype=torch.float64), []

    def counted(t):
        calls.append(t)
        return product(matrices)(t)

    x, _ = gmres(counted, b, rtol=1e-12, restart=10, cycles=1)
    close(x, array(torch.linalg.solve(matrices, b)), 1e-9)
    assert len(calls) <= rank + 2  # one more where rounding hides that it ended


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_singular_systems_stay_finite_and_do_no_harm(rank):
    """What cannot be solved is left: never further from b than x = 0 is, and no component blows up."""
    left, right = torch.randn(5, 10, rank, dtype=torch.float64), torch.randn(5, rank, 10, dtype=torch.float64)
    matrices, b = left @ right, torch.randn(5, 10, dtype=torch.float64)
    x, norm = gmres(product(matrices), b, rtol=1e-12, restart=20, cycles=3)
    size = torch.linalg.vector_norm(b, dim=-1)
    assert bool(x.isfinite().all())
    assert bool((residual(matrices, x, b) <= size * (1 + 1e-9)).all())
    close(norm, array(residual(matrices, x, b)), 1e-6)


@pytest.mark.parametrize(
    "matrix", [[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]], ids=str
)
def test_small_awkward_systems(matrix):
    matrices = torch.tensor([matrix], dtype=torch.float64)
    for b in ([1.0, 0.0], [1.0, 1.0], [0.0, 0.0]):
        b = torch.tensor([b], dtype=torch.float64)
        x, _ = gmres(product(matrices), b, rtol=1e-12, restart=5, cycles=2)
        best = np.linalg.norm(matrix @ np.linalg.pinv(matrix) @ array(b[0]) - array(b[0]))  # least squares
        found = float(residual(matrices, x, b))
        assert best - 1e-12 <= found <= float(torch.linalg.vector_norm(b)) + 1e-12
        assert float(x.abs().max()) < 1e3


@given(scale=st.floats(-30, 30), seed=st.integers(0, 50))
def test_gmres_does_not_depend_on_units(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.eye(6, dtype=torch.float64) + 0.1 * torch.randn(1, 6, 6, dtype=torch.float64, generator=generator)
    b = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    x, _ = gmres(product(matrices), b, rtol=1e-12, restart=6, cycles=2)
    scaled, _ = gmres(product(matrices), b * 10**scale, rtol=1e-12, restart=6, cycles=2)
    close(scaled / 10**scale, array(x), 1e-10)


@pytest.mark.parametrize("kind", ["real", "complex", "negative", "nilpotent", "zero"])
def test_spectral_radius_equals_the_eigenvalues(kind):
    rotation = torch.tensor([[0.0, -1.3], [1.3, 0.0]], dtype=torch.float64)
    blocks = {
        "real": torch.diag(torch.tensor([0.5, 0.9, -0.2])).double(),
        "complex": torch.block_diag(rotation, torch.tensor([[0.3]])).double(),
        "negative": torch.diag(torch.tensor([0.5, -0.9, 0.1])).double(),
        "nilpotent": torch.ones(3, 3, dtype=torch.float64).tril(-1),
        "zero": torch.zeros(3, 3, dtype=torch.float64),
    }
    basis = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64))[0]
    matrices = basis @ blocks[kind] @ basis.mT
    if kind == "nilpotent":
        matrices = blocks[kind].expand(2, 3, 3)
    expected = torch.linalg.eigvals(blocks[kind]).abs().max()
    found = spectral_radius(product(matrices), torch.randn(2, 3, dtype=torch.float64), iterations=2000)
    # The mean of logs over 1000 products leaves at most log(|start| / |end|) / 1000 of the start's direction.
    close(found, np.full(2, float(expected)), 5e-3)


def test_spectral_radius_of_each_system():
    matrices = torch.stack([s * torch.eye(4, dtype=torch.float64) for s in (0.1, 1.0, 7.0)])
    close(spectral_radius(product(matrices), torch.ones(3, 4, dtype=torch.float64)), np.array([0.1, 1.0, 7.0]), 1e-12)


def test_the_largest_magnitude_of_each_sample():
    t = torch.tensor([[[1.0, -3.0], [2.0, 0.5]], [[0.0, 0.0], [0.0, -0.0]], [[torch.nan, 1.0], [0.0, 0.0]]])
    assert largest(t)[:2].tolist() == [3.0, 0.0]
    assert bool(largest(t)[2].isnan())
    assert largest(torch.tensor([-2.0, torch.inf, -torch.inf])).tolist() == [2.0, torch.inf, torch.inf]
