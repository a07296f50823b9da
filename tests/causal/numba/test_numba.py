"""The compiled diagonal blocks against the torch ones, which the oracle holds: outputs and all gradients."""

import ctypes
import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal.diagonal import BlockAdjointSolver, BlockSolver
from implicit_attention.causal.numba import roots
from implicit_attention.causal.rows import RowProblem, solve_rows

OPTIONS = {
    "plain": {},
    "norm": {"qk_norm": True},
    "rope": {"positions": "rope", "qk_norm": True},
    "alibi": {"positions": "alibi"},
    "relative": {"positions": "relative"},
    "input": {"query_input": True, "bias": True},
    "self-input": {"self_query": "input", "qk_norm": True},
    "window": {"window": 9},
    "identity": {"values": "identity"},
}


def make(kernel, tol, dtype, *, embed=24, heads=2, seed=0, hard=1.0, **options):
    torch.manual_seed(seed)
    solver = ForwardSubstitution(rtol=tol, atol=tol, kernel=kernel)
    layer = ImplicitQueryAttention(embed, heads, is_causal=True, solver=solver, **options).to(dtype)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(hard)
    return layer


def run(kernel, x, tol, **options):
    """Return the solution and the gradients of input and parameters for a fixed cotangent."""
    layer = make(kernel, tol, x.dtype, **options)
    x = x.clone().requires_grad_()
    solution = layer.solve(x)
    weight = torch.randn(solution.value.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = torch.autograd.grad(solution.value, [x, *layer.parameters()], weight, allow_unused=True)
    return solution, [g for g in found if g is not None]


def inputs(batch, n, embed=24, dtype=torch.float64, seed=2):
    return torch.randn(batch, n, embed, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(x, tol, allowed, **options):
    ours, ours_grads = run("numba", x, tol, **options)
    other, other_grads = run("torch", x, tol, **options)
    assert bool(ours.converged.all())
    assert bool(other.converged.all())
    torch.testing.assert_close(ours.value, other.value, rtol=allowed, atol=allowed)
    for mine, theirs in zip(ours.memo, other.memo, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * allowed, atol=10 * allowed)
    scale = max(float(g.abs().max()) for g in other_grads)
    for mine, theirs in zip(ours_grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=allowed * max(scale, 1.0))


@pytest.mark.parametrize("heads", [1, 2, 8], ids=lambda h: f"H{h}")
@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 63, 64, 65, 200], ids=lambda n: f"N{n}")
def test_equals_torch_at_block_edges(n, heads):
    assert_same(inputs(2, n), 1e-14, 1e-12, heads=heads, qk_norm=heads == 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch_for_every_option(name):
    assert_same(inputs(3, 70), 1e-14, 1e-12, **OPTIONS[name])


@pytest.mark.parametrize("embed", [24, 20, 136], ids=lambda e: f"d{e // 4}")
def test_equals_torch_for_any_head_dimension_and_groups(embed):
    assert_same(inputs(2, 40, embed), 1e-14, 1e-12, embed=embed, heads=4, num_kv_heads=2, qk_norm=True)


def test_float32_is_within_its_tolerance():
    """Off float64 by no more than a few times what torch is, whose error is residual times condition."""
    tol, options = 1e-5, {"heads": 4, "qk_norm": True}
    x = inputs(2, 130)
    exact, exact_grads = run("torch", x, 1e-14, **options)
    rough, rough_grads = run("torch", x.float(), tol, **options)
    found, found_grads = run("numba", x.float(), tol, **options)
    assert bool(found.converged.all())
    floor = 10 * tol
    off = float(((rough.value - exact.value).detach()).abs().max())
    assert float(((found.value - exact.value).detach()).abs().max()) <= 4 * max(off, floor)
    for mine, rough_one, theirs in zip(found_grads, rough_grads, exact_grads, strict=True):
        off = float((rough_one - theirs).abs().max())
        assert float((mine - theirs).abs().max()) <= 4 * max(off, floor * float(theirs.abs().max()))


def test_residual_is_that_of_the_value_returned():
    x = inputs(2, 90)
    layer = make("numba", 1e-6, x.dtype, qk_norm=True, heads=4)
    with torch.no_grad():
        solution = layer.solve(x)
        equation = layer.equation(x)
        again = (equation.function(solution.value, *equation.args) - solution.value).abs().amax(-1)
    torch.testing.assert_close(solution.residual, again, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("hard", [10.0, 60.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_hard_weights_are_solved(heads, hard):
    x = inputs(2, 80)
    solution, _ = run("numba", x, 1e-11, heads=heads, hard=hard)
    assert bool(solution.converged.all())
    assert float((solution.residual - 1e-11 * (1.0 + solution.value.detach().abs().amax(-1))).max()) <= 1e-12


def test_rows_that_newton_does_not_solve_go_to_torch(monkeypatch):
    rows = []
    settle = BlockSolver.settle
    monkeypatch.setattr(BlockSolver, "settle", lambda self, *a: rows.append(self.n) or settle(self, *a))
    solution, _ = run("numba", inputs(2, 64, seed=5), 1e-10, heads=1, hard=60.0)
    assert rows, "no row was hard: the test tests nothing"
    assert max(rows) <= 4
    assert bool(solution.converged.all())


def test_rows_are_settled_here_and_not_in_torch(monkeypatch):
    def refuse(*_):
        raise AssertionError("torch was asked")

    monkeypatch.setattr(BlockSolver, "settle", refuse)
    monkeypatch.setattr(BlockAdjointSolver, "solve", refuse)
    run("numba", inputs(2, 100), 1e-5, heads=4)


def test_same_for_any_batch_and_threads():
    x = inputs(3, 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, one_grads = run("numba", x, 1e-6, heads=4, qk_norm=True)
        torch.set_num_threads(2)
        two, two_grads = run("numba", x, 1e-6, heads=4, qk_norm=True)
        alone, _ = run("numba", x[1:2], 1e-6, heads=4, qk_norm=True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two.value, one.value, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(alone.value, one.value[1:2], rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(two_grads, one_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_padding_hides_rows_from_themselves():
    x = inputs(2, 40)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :11] = True
    padding[1, 30:] = True
    found = []
    for kernel in ("numba", "torch"):
        layer = make(kernel, 1e-14, x.dtype, heads=4)
        found.append(layer.solve(x, key_padding_mask=padding).value)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_nan_raises_as_before():
    x = inputs(2, 40)
    x[1, 17, 3] = torch.nan
    for kernel in ("numba", "torch"):
        with pytest.raises(ValueError, match="holds 1 NaN or Inf"):
            make(kernel, 1e-8, x.dtype).solve(x)


def kernel_for(layer, x):
    equation = layer.equation(x)
    return layer.solver.kernel_for(equation.function, equation.args)


def test_choice_is_visible():
    x = inputs(1, 20)
    assert kernel_for(make("auto", 1e-8, x.dtype), x) == "numba"
    assert kernel_for(make("torch", 1e-8, x.dtype), x) == "torch"
    assert kernel_for(make("auto", 1e-8, x.dtype), x[:, :1]) == "torch"
    assert kernel_for(make("auto", 1e-2, torch.bfloat16), x.bfloat16()) == "torch"
    assert kernel_for(make("auto", 1e-8, x.dtype, dropout=0.1).train(), x) == "torch"


def test_numba_where_it_cannot_serve_is_an_error():
    with pytest.raises(ValueError, match=r"`kernel` must be .*float32 or float64.*bfloat16"):
        make("numba", 1e-2, torch.bfloat16).solve(inputs(1, 20).bfloat16())
    with pytest.raises(ValueError, match="dropout is on"):
        make("numba", 1e-8, torch.float64, dropout=0.1).train().solve(inputs(1, 20))
    with pytest.raises(ValueError, match="`kernel` must be one of"):
        ForwardSubstitution(kernel="fast")


def test_missing_numba(monkeypatch):
    monkeypatch.setattr("implicit_attention.causal.engines.find_spec", lambda name: None)
    x = inputs(1, 20)
    assert kernel_for(make("auto", 1e-8, x.dtype), x) == "torch"
    with pytest.raises(ImportError, match=r"implicit-attention\[cpu\]"):
        make("numba", 1e-8, x.dtype).solve(x)


def test_compiles_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("numba", inputs(1, 20), 1e-8)
    assert "numba" in sys.modules


@pytest.fixture
def small_kernel(tmp_path, monkeypatch):
    """A module with a kernel, and where numba keeps it."""

    def made(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    yield made
    for name in ("small_kernel", "hidden_kernel"):
        sys.modules.pop(name, None)


KERNEL = """
from implicit_attention.causal.numba.machine import kernel

@kernel
def seven(c):
    c[0] = 7
"""


def complaints(caplog):
    """What was logged, but for the line that a slow or busy machine gets while it compiles."""
    return [line for line in caplog.messages if not line.startswith("Compiling a kernel")]


def test_whoever_uses_a_kernel_has_loaded_it(small_kernel, tmp_path, caplog):
    """The process that compiles a kernel has other last digits than all that load it."""
    module = small_kernel("small_kernel", KERNEL)
    compiled = module.seven()
    assert compiled.cache_hits == 1
    assert list(tmp_path.glob("**/*.nbi"))
    told = np.zeros(1, dtype=np.int64)
    compiled.ctypes(told.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    assert told[0] == 7
    assert not complaints(caplog)


def test_a_path_that_only_this_process_understands_does_no_harm(small_kernel, monkeypatch, caplog):
    module = small_kernel("small_kernel", KERNEL)  # first: what it does to the path is undone last
    monkeypatch.setattr(sys, "path", [Path("/nowhere"), "", *sys.path])
    assert module.seven().cache_hits == 1
    assert not complaints(caplog)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "there is no Python to start"),
        ("/nowhere/python", "No such file or directory: '/nowhere/python'"),
        ("/bin/false", "it ended with status 1"),
        (sys.executable, "cannot import name 'seven'"),
    ],
    ids=["none", "missing", "fails", "hidden"],
)
def test_where_no_other_process_compiles_this_one_does(program, said, small_kernel, monkeypatch, caplog):
    module = small_kernel("hidden_kernel", KERNEL + "\nkept = seven\ndel seven\n")
    monkeypatch.setattr(sys, "executable", program)
    assert module.kept().cache_hits == 0
    assert said in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_saturated_rows_are_solved_or_said(dtype):
    """Scores of thousands: weights of exactly 0 and 1, where an own equation divides by zero."""
    tol = 1e-4 if dtype == torch.float32 else 1e-10
    for seed in range(4):
        torch.manual_seed(seed)
        solver = ForwardSubstitution(rtol=tol, atol=tol, kernel="numba")
        layer = ImplicitQueryAttention(64, 2, is_causal=True, solver=solver, on_failure="ignore").to(dtype)
        with torch.no_grad():
            layer.Omega_Q.weight.mul_(30.0)
            layer.W_K.weight.mul_(30.0)
            for batch in (1, 2, 5):
                x = torch.randn(batch, 130, 64, dtype=dtype)
                solution = layer.solve(x)
                function, args, _ = layer.equation(x)
                wide = tuple(t.double() if t.is_floating_point() else t for t in args)
                y = solution.value.double()
                f = function(y, *wide)
                residual, size = (f - y).abs().amax(-1), f.abs().amax(-1)
                # Scores are rounded to eps times their size, here up to a few thousand.
                rounding = 4e3 * torch.finfo(dtype).eps * size
                assert bool((~solution.converged | (residual <= tol * (1.0 + size) + rounding)).all())
                assert int((~solution.converged).sum()) <= 1


@pytest.mark.parametrize("normed", [False, True], ids=["linear", "normed"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8], ids=lambda h: f"H{h}")
def test_roots_are_those_of_the_row_solver(heads, normed):
    """Offsets and slopes of standard deviation 3 to 30: rows for each of its methods, the curve among them."""
    generator = torch.Generator().manual_seed(heads)

    @njit(error_model="numpy")
    def solve_all(alpha, beta, offset, gram, p, solved):
        for row in range(len(alpha)):
            solved[row] = roots.solve(alpha[row], beta[row], offset[row], gram[row], p[row])

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count, size = 300, torch.tensor([3.0, 10.0, 30.0], dtype=torch.float64).repeat_interleave(100)[:, None, None]
    query, key = draw(count, 1 + heads, 16), draw(count, heads, 16) * size / 4.0
    score = key @ query.mT
    gram = query @ query.mT / 16.0 if normed else None
    whole = None if gram is None else gram[:, None].expand(-1, heads, -1, -1)
    problem = RowProblem(score[..., 0], score[..., 1:], draw(count, heads) * size[..., 0] - 2.0, whole)
    wanted = solve_rows(problem, 1e-12)
    p, solved = np.empty((count, heads)), np.zeros(count, dtype=bool)
    grams = np.empty((count, 0, heads + 1, heads + 1)) if gram is None else gram[:, None].numpy()
    solve_all(*(t.contiguous().numpy() for t in (problem.alpha, problem.beta, problem.offset)), grams, p, solved)
    assert solved.all()
    assert bool(wanted.solved.all())
    np.testing.assert_allclose(p, wanted.p.numpy(), rtol=0.0, atol=1e-9)
