"""The C++ adjoint of some rows with weights of any size, against the torch one and the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal.backward_substitution import Equilibrium
from implicit_attention.causal.cpu.engine import AdjointKernel
from implicit_attention.causal.diagonal_adjoint import (
    NEAR_SINGULAR,
    BlockAdjointSolver,
    near_singular,
)
from implicit_attention.causal.own_columns import own_jacobian
from implicit_attention.causal.system import CausalSystem
from tests.bridge import array, close, make_layer, oracle_gradients, problem_of

HARD = (1.0, 3.0, 10.0, 30.0)
OPTIONS = {
    "plain": {},
    "norm": {"qk_norm": True},
    "rope": {"positions": "rope", "qk_norm": True},
    "relative": {"positions": "relative"},
    "self-input": {"self_query": "input"},
    "window": {"window": 9},
    "groups": {"num_kv_heads": 2, "qk_norm": True},
}


class Block:
    """A block of a layer with scaled weights, and what the adjoint equation needs there; y need not be F(y)."""

    def __init__(self, n, *, batch=2, hard=1.0, heads=4, embed=48, dtype=torch.float64, tol=1e-12, seed=0, **options):
        torch.manual_seed(seed)
        layer = ImplicitQueryAttention(embed, heads, is_causal=True, **options).to(dtype)
        with torch.no_grad():
            layer.Omega_Q.weight.mul_(hard)
            if layer.temperature is not None:
                layer.temperature.mul_(hard)
            equation = layer.equation(torch.randn(batch, n, embed).to(dtype))
            self.y = equation.function(equation.start, *equation.args)
        self.n, self.function, self.args = n, equation.function, tuple(a.detach() for a in equation.args)
        self.grad = torch.randn(batch, n, embed).to(dtype).view(batch, n, heads, -1)
        later = torch.randn(batch, n, layer.Omega_Q.weight.shape[0]).to(dtype)
        self.later = later.view(batch, n, -1, embed // heads)
        self.allowed = tol * self.grad.abs().amax((1, 2, 3))

    def only(self, b):
        """The block of one sample."""
        one = Block.__new__(Block)
        one.n, one.function = self.n, self.function
        batch = len(self.y)
        one.args = tuple(a[b : b + 1] if a.dim() > 2 and len(a) == batch else a for a in self.args)
        for name in ("y", "grad", "later", "allowed"):
            setattr(one, name, getattr(self, name)[b : b + 1])
        return one

    def at(self):
        return Equilibrium(CausalSystem(self.function, self.args), self.y, ())

    def compiled(self):
        at = self.at()
        named = {"y": at.y, "query": at.query, "inverse": at.inverse, "lse": at.lse}
        kernel = AdjointKernel(at.system, named, self.grad, self.later, self.allowed, self.n)
        return kernel.solve(slice(0, self.n))

    def eager(self):
        return self.at().block(slice(0, self.n)).solve(self.grad, self.later, self.allowed)

    def residual(self, lam):
        """Of the whole equation, in float64, by sample."""
        wide = Block.__new__(Block)
        wide.function, wide.y = self.function, self.y.double()
        wide.args = tuple(a.double() if a.is_floating_point() else a for a in self.args)
        solver, lam = wide.at().block(slice(0, self.n)), lam.double()
        d_query = solver._d_query(solver._slope(lam, solver.weights))
        again = solver._pulled(self.grad.double(), self.later.double() + d_query)
        return (again - lam).abs().amax((1, 2, 3))

    def gains(self):
        """Eigenvalues of the rows' own Jacobians."""
        at, rows = self.at(), slice(0, self.n)
        return torch.linalg.eigvals(own_jacobian(at.system, rows, at.y, at.queries(rows), at.block(rows).p))


def refuse(*_):
    raise AssertionError("torch was asked")


def assert_same(found, wanted, allowed):
    scale = max(1.0, float(wanted.lam.abs().max()))
    for name in ("lam", "d_made", "d_key", "d_value"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        size = max(scale, float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=allowed * size, msg=lambda m, n=name: f"{n}: {m}")
    own = wanted.slope.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.slope[..., 0], own, rtol=0.0, atol=allowed * max(scale, float(own.abs().max())))


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 63, 64, 65], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("heads", [1, 2, 4, 8], ids=lambda h: f"H{h}")
def test_equals_torch(heads, n, hard):
    block = Block(n, heads=heads, hard=hard)
    assert_same(block.compiled(), block.eager(), 1e-9)


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch_for_every_option(name, hard):
    block = Block(37, hard=hard, **OPTIONS[name])
    assert_same(block.compiled(), block.eager(), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("heads", [1, 8], ids=lambda h: f"H{h}")
@pytest.mark.parametrize("hard", HARD)
def test_residual_is_that_of_the_solution(hard, heads, dtype):
    """Up to the rounding of the equation itself: cotangents and scores times epsilon."""
    block = Block(64, hard=hard, heads=heads, dtype=dtype, tol=1e-5)
    found = block.compiled()
    rounding = torch.finfo(dtype).eps * 100 * hard * found.lam.double().abs().amax((1, 2, 3))
    assert bool((block.residual(found.lam) <= found.residual * 1.01 + rounding).all())
    assert bool((found.residual <= block.allowed + rounding).all())


def test_few_sweeps_do_where_rows_hold_on_to_themselves():
    """Gains above 1: sweeps alone would diverge."""
    block = Block(64, hard=30.0)
    assert float(block.gains().abs().max()) > 2.0
    assert block.compiled().sweeps <= 12


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"num_heads": 4, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("n", [1, 4, 5, 9])
@pytest.mark.parametrize("gain", [3.0, 10.0])
def test_equals_oracle(gain, n, options, monkeypatch):
    """The whole backward pass, without torch's help, by dense algebra."""

    monkeypatch.setattr(BlockAdjointSolver, "solve", refuse)
    solver = ForwardSubstitution(block=64, rtol=1e-15, atol=1e-13, kernel="cpp")
    layer = make_layer(8, is_causal=True, seed=n, gain=gain, solver=solver, **options)
    x = torch.randn(2, n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n), requires_grad=True)
    solution = layer.solve(x, gains=True)
    assert float(solution.gain.detach().sub(1.0).abs().min()) > 1e-2, "too near a fold to compare gradients"
    cotangent = np.random.default_rng(n).standard_normal(solution.value.shape)
    wanted = oracle_gradients(layer, problem_of(layer, x), array(solution.value), cotangent)
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((solution.value * torch.from_numpy(cotangent)).sum(), list(leaves.values()))
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        close(grad, wanted[name].reshape(leaf.shape), 1e-8)


@pytest.mark.parametrize(("heads", "seed"), [(4, 3), (2, 3)])
def test_rows_near_a_fold_are_counted(heads, seed):
    """Scale the weights until one gain is that near 1."""

    def nearest(hard):
        return float((Block(8, batch=1, heads=heads, hard=hard, seed=seed).gains() - 1.0).real.max())

    low, high = 1.0, 1.0
    while nearest(high) < 0.0:
        high *= 1.1
        assert high < 100.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if nearest(middle) < -0.5 * NEAR_SINGULAR else (low, middle)
    near = Block(8, batch=1, heads=heads, hard=low, seed=seed)
    found = near.compiled()
    assert found.near_singular == 1
    assert float(found.residual.max()) <= 1e-9 * float(found.lam.abs().max()), "of a solution that is large there"
    assert Block(8, batch=1, heads=heads, hard=0.9 * low, seed=seed).compiled().near_singular == 0


def test_rows_are_counted_where_eigenvalues_do_not_converge(monkeypatch):
    def fail(_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigvals", fail)
    matrices = torch.diag_embed(torch.tensor([[0.5, 0.9], [1.0001, 0.1], [3.0, -1.0]]))
    assert near_singular(matrices) == 1


@pytest.mark.parametrize("hard", [1.0, 10.0])
def test_same_bits_for_any_batch_and_threads(hard):
    block = Block(65, batch=3, hard=hard, dtype=torch.float32, tol=1e-5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(block.compiled())
            alone = block.only(1).compiled()
            for name in ("lam", "d_made", "d_key", "d_value", "slope"):
                assert torch.equal(getattr(alone, name)[0], getattr(found[-1], name)[1]), name
    finally:
        torch.set_num_threads(threads)
    for name in ("lam", "d_made", "d_key", "d_value", "slope", "residual"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_solved(bad, row):
    """Wherever it stands among the rows that are solved together."""
    block = Block(9, hard=3.0)
    block.grad[1, row, 0, 0] = bad
    assert block.compiled() is None
    block = Block(9, hard=3.0)
    block.later[0, row, 0, 0] = bad
    assert block.compiled() is None


@pytest.mark.parametrize("hard", [3.0, 10.0])
@pytest.mark.parametrize("heads", [1, 2, 8], ids=lambda h: f"H{h}")
def test_hard_weights_do_not_go_to_torch(heads, hard, monkeypatch):
    """At equilibria, over several blocks."""
    torch.manual_seed(heads)
    solver = ForwardSubstitution(rtol=1e-12, atol=1e-12, kernel="cpp")
    layer = ImplicitQueryAttention(48, heads, is_causal=True, solver=solver, dtype=torch.float64)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(hard)
        layer.W_K.weight.mul_(hard)
        x = torch.randn(2, 70, 48, dtype=torch.float64)
        solution = layer.solve(x, gains=True)
        function, args, _ = layer.equation(x)
        args = tuple(a.detach() for a in args)
    grad, needs = torch.randn(2, 70, 48, dtype=torch.float64), tuple(a.is_floating_point() for a in args)
    wanted = replace(solver, kernel="torch").adjoint(function, args, solution.value, solution.memo, grad, needs)
    monkeypatch.setattr(BlockAdjointSolver, "solve", refuse)
    found = solver.adjoint(function, args, solution.value, solution.memo, grad, needs)
    assert bool(found.converged.all())
    nearest = float((solution.gain - 1.0).abs().min())
    for mine, theirs in zip(found.by_arg, wanted.by_arg, strict=True):
        if theirs is not None:
            assert float((mine - theirs).abs().max()) <= 1e-10 * max(1.0, float(theirs.abs().max())) / nearest
