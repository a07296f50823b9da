"""The C++ kernels against torch, which the oracle holds: outputs and all gradients of whole layers."""

import pytest
import torch

from implicit_attention.causal.cpu import engine
from implicit_attention.causal.diagonal import BlockSolver
from tests.causal.cpu.cases import OPTIONS, SIZES, assert_same, inputs, make, refuse_torch, run


@pytest.mark.parametrize("heads", [1, 2, 8], ids=lambda h: f"H{h}")
@pytest.mark.parametrize("n", [*SIZES, 15, 16, 17, 200, 600], ids=lambda n: f"N{n}")
def test_equals_torch_at_block_edges(n, heads):
    assert_same(inputs(2, n), 1e-14, 1e-12, heads=heads, qk_norm=heads == 1)


@pytest.mark.parametrize("n", [1, 70, 200], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch_for_every_option(name, n):
    assert_same(inputs(3, n), 1e-14, 1e-12, **OPTIONS[name])


@pytest.mark.parametrize("name", ["norm", "groups", "alibi", "dropout", "self-input"])
def test_no_row_is_handed_to_torch(name, monkeypatch):
    refuse_torch(monkeypatch)
    run("cpp", inputs(2, 150), 1e-6, **OPTIONS[name])


@pytest.mark.parametrize("embed", [24, 20, 136], ids=lambda e: f"d{e // 4}")
def test_equals_torch_for_any_head_dimension_and_groups(embed):
    assert_same(inputs(2, 70, embed), 1e-14, 1e-12, embed=embed, heads=4, num_kv_heads=2, qk_norm=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_nearer_than_asked(name):
    """Sweeps go on within tolerance, `1e-4 (1 + |y|)` with |y| about 1.5. Without that, residuals are up to 2e-4."""
    found, _ = run("cpp", inputs(2, 130), 1e-4, **{"heads": 4} | OPTIONS[name])
    assert float(found.residual.max()) <= 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_is_within_its_tolerance(name):
    """Off float64 by no more than a few times what torch is, whose error is residual times condition."""
    tol, options, x = 1e-5, {"heads": 4} | OPTIONS[name], inputs(2, 130)
    exact, exact_grads = run("torch", x, 1e-14, **options)
    rough, rough_grads = run("torch", x.float(), tol, **options)
    found, found_grads = run("cpp", x.float(), tol, **options)
    assert bool(found.converged.all())
    floor = 10 * tol
    off = float(((rough.value - exact.value).detach()).abs().max())
    assert float(((found.value - exact.value).detach()).abs().max()) <= 4 * max(off, floor)
    # A gradient may be a sum that cancels: it is off by the tolerance of its summands.
    largest = max(float(grad.abs().max()) for grad in exact_grads)
    for mine, rough_one, theirs in zip(found_grads, rough_grads, exact_grads, strict=True):
        off = float((rough_one - theirs).abs().max())
        allowed = max(off, floor * float(theirs.abs().max()), tol * largest)
        assert float((mine - theirs).abs().max()) <= 4 * allowed


@pytest.mark.parametrize("options", [{}, {"self_query": "input"}, {"num_kv_heads": 2}], ids=str)
def test_padding_hides_rows_from_themselves(options):
    """The first rows of one sample see nothing, and others not themselves."""
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[0, :11] = True
    padding[1, 30:] = True
    assert_same(inputs(2, 70), 1e-14, 1e-12, heads=4, call={"key_padding_mask": padding}, **options)


@pytest.mark.parametrize("name", ["norm", "rope", "self-input", "groups"])
def test_equals_torch_after_a_cache(name):
    x, found = inputs(2, 200), []
    for kernel in ("cpp", "torch"):
        layer = make(kernel, 1e-14, x.dtype, **OPTIONS[name])
        cache = layer.make_cache(2, 200)
        with torch.no_grad():
            layer.solve(x[:, :61], cache=cache)
        rest = x[:, 61:].clone().requires_grad_()
        value = layer.solve(rest, cache=cache).value
        found.append([value, *torch.autograd.grad(value.square().sum(), [rest, *layer.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_residual_is_that_of_the_value_returned():
    x = inputs(2, 90)
    layer = make("cpp", 1e-6, x.dtype, qk_norm=True, heads=4)
    with torch.no_grad():
        solution = layer.solve(x)
        equation = layer.equation(x)
        again = (equation.function(solution.value, *equation.args) - solution.value).abs().amax(-1)
    torch.testing.assert_close(solution.residual, again, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("hard", [3.0, 10.0, 30.0, 60.0])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_hard_weights_are_solved(heads, hard):
    """Rows have several roots of their own."""
    x = inputs(2, 80)
    solution, _ = run("cpp", x, 1e-11, heads=heads, hard=hard)
    assert bool(solution.converged.all())
    assert float((solution.residual - 1e-11 * (1.0 + solution.value.detach().abs().amax(-1))).max()) <= 1e-12


def test_rows_that_the_kernel_gives_up_on_go_to_torch(monkeypatch):
    """With their neighbours; other samples get back what they saw before, and what follows comes back."""
    rows, given_up = [], []
    settle, hand_back = BlockSolver.settle, engine.hand_back
    monkeypatch.setattr(BlockSolver, "settle", lambda self, *a: rows.append(self.n) or settle(self, *a))

    def give_up(into, y, lse, block, done):  # at row 20 of sample 1
        if not given_up:
            given_up.append(block)
            into["y"][1, 20:], into["lse"][1, :, 20:] = y[1, 20:], lse[1, :, 20:]
            done = [90, 20, 90]
        return hand_back(into, y, lse, block, done)

    monkeypatch.setattr(engine, "hand_back", give_up)
    assert_same(inputs(3, 90), 1e-14, 1e-12, heads=4)
    assert rows[:1] == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_saturated_rows_are_solved_or_said(dtype):
    """Scores of thousands: weights of exactly 0 and 1, where an own equation divides by zero."""
    tol = 1e-4 if dtype == torch.float32 else 1e-10
    for seed in range(4):
        layer = make("cpp", tol, dtype, embed=64, seed=seed, hard=30.0, on_failure="ignore")
        with torch.no_grad():
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


def test_nan_raises_as_with_torch():
    x = inputs(2, 40)
    x[1, 17, 3] = torch.nan
    for kernel in ("cpp", "torch"):
        with pytest.raises(ValueError, match="holds 1 NaN or Inf"):
            make(kernel, 1e-8, x.dtype).solve(x)


@pytest.mark.parametrize("positions", ["relative", None])
def test_gradients_of_biases_do_not_go_to_torch(positions, monkeypatch):
    """Of a table of offsets, and of a mask that is learned."""
    x, found = inputs(2, 150), []
    for kernel in ("torch", "cpp"):
        if kernel == "cpp":
            refuse_torch(monkeypatch)
        layer = make(kernel, 1e-13, x.dtype, heads=4, positions=positions)
        mask = torch.randn(4, 150, 150, generator=torch.Generator().manual_seed(4), dtype=x.dtype, requires_grad=True)
        value = layer.solve(x, attn_mask=mask.repeat(2, 1, 1)).value
        found.append(torch.autograd.grad(value.square().sum(), [mask, *layer.parameters()]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
