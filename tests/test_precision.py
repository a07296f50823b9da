"""bfloat16 and float16 against float64: errors within what the rounding of the map itself accounts for.

All weights and inputs are numbers of the narrow dtype, so that both precisions are given the same problem.
"""

import copy

import numpy as np
import pytest
import torch
from torch.func import jacrev

from implicit_attention import Anderson, ForwardSubstitution, ImplicitQueryAttention, Picard

pytestmark = pytest.mark.usefixtures("brisk_interpreter")
F64 = torch.float64
ROWS, SIZE = 18, 16
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SOLVERS = {
    "torch": lambda tol: ForwardSubstitution(rtol=tol, atol=tol, kernel="torch"),
    "triton": lambda tol: ForwardSubstitution(rtol=tol, atol=tol, kernel="triton"),
    "picard": lambda tol: Picard(rtol=tol, atol=tol, max_steps=100),
    "anderson": lambda tol: Anderson(rtol=tol, atol=tol, max_steps=100),
}
OPTIONS = {
    "plain": {},
    "norm": {"qk_norm": True, "positions": "rope"},
    "input": {"query_input": True, "bias": True},
}
GAUSS = np.polynomial.legendre.leggauss(4)


def make(name, dtype, options, tol):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a device, Triton's kernels do not serve the CPU")
    torch.manual_seed(0)
    is_causal = name in ("torch", "triton")
    solver = SOLVERS[name](tol)
    layer = ImplicitQueryAttention(SIZE, 2, is_causal=is_causal, solver=solver, on_failure="ignore", **OPTIONS[options])
    if layer.temperature is not None and not is_causal:  # else the loop, which gradients are compared with, diverges
        torch.nn.init.constant_(layer.temperature, 0.3)
    return layer.to(dtype), torch.randn(1, ROWS, SIZE).to(dtype)


def exactly(layer, tol=1e-12):
    twin = copy.deepcopy(layer).to(F64)
    kind = ForwardSubstitution if layer.is_causal else Anderson
    twin.solver = kind(rtol=tol, atol=tol)
    return twin


def largest(t):
    return float(t.detach().abs().max())


def mean_jacobian(equation, start, end):
    """The integral of the Jacobian from one point to another, so that F(end) - F(start) is its product with the way."""
    total = torch.zeros(start.numel(), start.numel(), dtype=F64)
    for node, weight in zip(*GAUSS, strict=True):
        at = start + (1 + node) / 2 * (end - start)
        total += weight / 2 * jacrev(lambda y: equation.function(y, *equation.args))(at).view_as(total)
    return total


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_equilibrium_is_off_by_its_residual_and_the_rounding_of_one_map(name, options, dtype):
    """With F the exact map, y* its equilibrium, G the rounded map and y where G was solved to a residual r:

    `|y - F(y)| <= r + |G(y) - F(y)|`, and `y - y* = (I - J)^-1 (y - F(y))` with J the mean Jacobian between the two.

    Residuals are measured before iterates are rounded to what is returned: half a rounding more. The map's rounding is
    that of the readable torch map; a kernel sums in another order, which may double it.
    """
    eps = torch.finfo(dtype).eps
    layer, x = make(name, dtype, options, eps / 4)
    exact = exactly(layer)
    with torch.no_grad():
        solution, truth = layer.solve(x), exact.solve(x.to(F64)).value
        assert bool(solution.converged.all())
        rough, wide = layer.equation(x), exact.equation(x.to(F64))
        y = solution.value.to(F64)
        image = wide.function(y, *wide.args)
        rounding = largest(rough.function(solution.value, *rough.args).to(F64) - image)
        assert rounding > 0  # else nothing is tested
        assert largest(y - image) <= float(solution.residual.max()) + 2 * rounding + eps / 2 * largest(y)
        jacobian = mean_jacobian(wide, truth, y)
        error = torch.linalg.solve(torch.eye(y.numel(), dtype=F64) - jacobian, (y - image).flatten())
        torch.testing.assert_close((y - truth).flatten(), error, rtol=0.0, atol=1e-6 * largest(y))  # of the quadrature


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.kernels) if n == "triton" else n for n in SOLVERS])
def test_gradients_lose_at_most_twice_what_backpropagation_through_the_loop_does(name, options, dtype):
    """The readable reference in the same dtype: the loop written out, differentiated by autograd."""
    eps = torch.finfo(dtype).eps
    layer, x = make(name, dtype, options, eps / 4)
    weight = torch.randn(1, ROWS, SIZE).to(dtype)

    def gradients(of, value, leaf):
        found = torch.autograd.grad(value, [leaf, *of.parameters()], weight.to(value.dtype))
        return [g.to(F64) for g in found]

    def solved(of):
        leaf = x.to(of.W_K.weight.dtype).requires_grad_()
        return gradients(of, of.solve(leaf).value, leaf)

    def unrolled(of):
        leaf = x.clone().requires_grad_()
        equation = of.equation(leaf)
        y = equation.start
        for _ in range(30):
            y = equation.function(y, *equation.args)
        return gradients(of, y, leaf)

    for mine, reference, true in zip(solved(layer), unrolled(layer), solved(exactly(layer)), strict=True):
        # Where the gradient is zero both are noise alone, and of two such samples either may have the larger extreme.
        factor = 4 if largest(true) < 1e-9 else 2
        assert largest(mine - true) <= factor * (largest(reference - true) + eps * largest(true))
