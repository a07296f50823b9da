"""What `fixed_point` can be given beyond real tensors and pure functions: complex arguments, modules with state."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from implicit_attention import (
    Anderson,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    fixed_point,
)

F64 = torch.float64
A = torch.tensor([0.3 + 0.2j], dtype=torch.complex128)


def loss(a, adjoint=None):
    """A real equilibrium that depends on a complex number: y = cos(Re(a y) + Im(a^2))."""
    y0 = torch.zeros(1, 1, dtype=F64)
    solver = Picard(max_steps=200) if isinstance(adjoint, Unrolled) else NewtonKrylov()
    found = fixed_point(lambda y, a: torch.cos((a * y).real + (a * a).imag), y0, (a,), solver=solver, adjoint=adjoint)
    return found.value.sin().sum()


def leaf():
    return A.clone().requires_grad_()


GRADIENTS = {
    "autograd": lambda: torch.autograd.grad(loss(a := leaf()), a)[0],
    "create_graph": lambda: torch.autograd.grad(loss(a := leaf()), a, create_graph=True)[0].detach(),
    "func": lambda: torch.func.grad(loss)(A),
    "vmap": lambda: torch.func.vmap(torch.func.grad(loss))(torch.stack([A, A]))[1],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_complex_arguments_get_their_gradient(name):
    expected = torch.autograd.grad(loss(a := leaf(), Unrolled()), a)[0]
    torch.testing.assert_close(GRADIENTS[name](), expected, rtol=1e-7, atol=1e-9)
    step = 1e-6
    for direction in (1.0, 1j):  # autograd's convention: the derivative along z is Re(conj(gradient) z)
        slope = (loss(A + step * direction) - loss(A - step * direction)) / (2 * step)
        assert float((expected.conj() * direction).real) == pytest.approx(float(slope), abs=1e-6)


def test_complex_arguments_have_second_derivatives():
    def gradient(a):
        return torch.func.grad(loss)(a)

    (first,) = torch.autograd.grad(loss(a := leaf()), a, create_graph=True)
    (second,) = torch.autograd.grad(first.real.sum() + 2 * first.imag.sum(), a)
    step = 1e-5
    for direction in (1.0, 1j):
        change = (gradient(A + step * direction) - gradient(A - step * direction)) / (2 * step)
        slope = change.real.sum() + 2 * change.imag.sum()
        assert float((second.conj() * direction).real) == pytest.approx(float(slope), abs=1e-5)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4, dtype=F64), nn.BatchNorm1d(4, dtype=F64)

    def forward(self, y, x):
        return torch.tanh(0.3 * self.norm(self.linear(y)) + x)


def test_batch_norm_in_training_updates_its_statistics_at_every_evaluation():
    module, x = Normed(), torch.randn(8, 4, dtype=F64)
    # It ties the samples together: they are one system.
    y0 = torch.zeros(1, 8, 4, dtype=F64)
    call = _Whole(module)
    solution = fixed_point(call, y0, (x[None],), solver=Picard(), adjoint=Implicit(), on_failure="ignore")
    tracked = int(module.norm.num_batches_tracked)
    assert 1 < tracked == solution.evaluations
    solution.value.sum().backward()
    assert int(module.norm.num_batches_tracked) == tracked, "the backward pass evaluates nothing anew"
    assert float(module.linear.weight.grad.norm()) > 0
    with pytest.raises(RuntimeError, match="in-place operation"):  # torch.func's own word, for the solver's derivatives
        fixed_point(call, y0, (x[None],), solver=NewtonKrylov())


class _Whole(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, y, x):
        return self.module(y[0], x[0])[None]


def test_batch_norm_in_eval_mode_is_an_ordinary_map():
    module, x = Normed().eval(), torch.randn(8, 4, dtype=F64)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    solution = fixed_point(module, torch.zeros(8, 4, dtype=F64), (x,), on_failure="raise")
    solution.value.sum().backward()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    torch.testing.assert_close(module(solution.value, x), solution.value, rtol=0, atol=1e-8)
    assert module.norm.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [{"query_input": True}, {"is_causal": True}, {"query_input": True, "adjoint": Unrolled()},
     {"is_causal": True, "self_query": "input"}, {"normalize_over": "keys", "query_input": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("way", ["autograd", "func"])
def test_third_derivatives_of_a_layer_are_refused_by_name(options, way):
    layer = ImplicitQueryAttention(4, 2, dtype=F64, **options)
    x = torch.randn(1, 4, 4, dtype=F64)

    def value(x):
        return layer(x).sin().sum()

    def derived(f):
        if way == "func":
            return lambda x: torch.func.grad(f)(x).sin().sum()
        return lambda x: torch.autograd.grad(f(x), x, create_graph=True)[0].sin().sum()

    second = derived(derived(value))
    x = x if way == "func" else x.requires_grad_()
    assert bool(torch.isfinite(second(x)))
    with pytest.raises(NotImplementedError, match="differentiable twice, and a third derivative was asked for"):
        derived(second)(x)


def test_a_module_that_holds_another_twice_is_left_as_it_was():
    """`torch.func.functional_call` would leave a tensor in the place of its parameter, without a gradient."""
    torch.manual_seed(0)
    twice, tied = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    tied.bias = twice.bias
    block = nn.Sequential(twice, nn.Tanh(), tied, twice)
    with torch.no_grad():
        for weight in {id(p): p for p in block.parameters()}.values():
            weight.mul_(0.5)
    names, held = list(block.state_dict()), list(block.parameters())
    start = torch.zeros(2, 3, dtype=torch.float64)
    y = fixed_point(block, start, solver=Anderson(rtol=1e-12, atol=1e-12)).value
    found = torch.autograd.grad(y.square().sum(), held)
    assert list(block.state_dict()) == names
    assert all(one is other for one, other in zip(block.parameters(), held, strict=True))
    unrolled = start
    for _ in range(200):
        unrolled = block(unrolled)
    for one, other in zip(found, torch.autograd.grad(unrolled.square().sum(), held), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_an_empty_batch_of_a_map_without_arguments():
    found = fixed_point(torch.cos, torch.zeros(0, 3))
    assert found.value.shape == (0, 3)
    assert found.converged.all()


class Wave(nn.Module):
    def __init__(self, gain):
        super().__init__()
        torch.manual_seed(1)
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.orthogonal_(self.f.weight, gain)

    def forward(self, y, x):
        return torch.sin(self.f(y) + self.g(x))


def autocast_loss(module, x, way="autograd"):
    def value(x):
        return fixed_point(module, torch.zeros(30, 4), (x,), on_failure="ignore").value

    with torch.autocast("cpu", torch.bfloat16):
        found = checkpoint(value, x, use_reentrant=False) if way == "checkpoint" else value(x)
    return found.float().square().sum()


@pytest.mark.parametrize("way", ["autograd", "create_graph", "checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("gain", [8.0, 0.5])
def test_the_backward_pass_evaluates_under_the_autocast_of_the_forward_pass(gain, way):
    module, x = Wave(gain), torch.randn(30, 4).bfloat16().requires_grad_()
    with torch.autograd.graph.save_on_cpu() if way == "save_on_cpu" else contextlib.nullcontext():
        loss = autocast_loss(module, x, way)
    found = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=way == "create_graph")
    assert all(bool(torch.isfinite(t).all()) for t in found)
    if gain < 1:  # one equilibrium: in float32 it has the same gradients, up to the rounding of bfloat16
        wide = x.detach().float().requires_grad_()
        value = fixed_point(module, torch.zeros(30, 4), (wide,)).value
        expected = torch.autograd.grad(value.square().sum(), [wide, *module.parameters()])
        for one, other in zip(found, expected, strict=True):
            assert float((one.detach().float() - other).norm()) <= 2.0**-5 * float(other.norm())
    if way == "create_graph":
        second = torch.autograd.grad(found[1].square().sum(), list(module.parameters()))
        assert all(bool(torch.isfinite(t).all()) for t in second)


def test_a_backward_pass_under_autocast_does_not_change_a_map_without():
    module, x = Wave(0.5), torch.randn(30, 4)
    gradients = []
    for enabled in (False, True):
        value = fixed_point(module, torch.zeros(30, 4), (x,)).value
        with torch.autocast("cpu", torch.bfloat16, enabled):
            gradients.append(torch.autograd.grad(value.square().sum(), list(module.parameters()), create_graph=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=lambda a: type(a).__name__)
def test_a_value_may_be_changed_in_place(adjoint):
    a = torch.tensor([0.5], dtype=F64, requires_grad=True)
    gradients = []
    for change in (torch.mul, torch.Tensor.mul_):
        y = fixed_point(lambda y, a: torch.cos(a * y), torch.zeros(1, 1, dtype=F64), (a,), adjoint=adjoint).value
        gradients.append(torch.autograd.grad(change(y, 2.0).sum(), a)[0])
    assert torch.equal(*gradients)
