"""Gradients through an equilibrium: by differences, against each other, and what is said when they fail."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from implicit_attention import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    fixed_point,
)
from tests.bridge import TIGHT, array, close, make_layer

ADJOINTS = {"implicit": Implicit(), "unrolled": Unrolled(), "checkpointed": Unrolled(checkpoint=True)}
LAYERS = {
    "queries": {"query_input": True},  # without it all rows of an unmasked layer settle on the mean value
    "queries-causal": {"is_causal": True},
    "queries-qk_norm": {"qk_norm": True, "query_input": True},
    "queries-causal-qk_norm": {"is_causal": True, "qk_norm": True},
    "keys": {"normalize_over": "keys", "query_input": True},
    "keys-causal": {"normalize_over": "keys", "is_causal": True},
    "keys-qk_norm": {"normalize_over": "keys", "qk_norm": True, "query_input": True},
    "keys-causal-qk_norm": {"normalize_over": "keys", "is_causal": True, "qk_norm": True, "query_input": True},
}
TIGHTEST = {
    "picard": Picard(rtol=1e-13, max_steps=300),
    "damped": Picard(damping=0.7, rtol=1e-13, max_steps=300),
    "anderson": Anderson(rtol=1e-13, max_steps=300),
    "broyden": Broyden(rtol=1e-13, max_steps=300),
    "newton": NewtonKrylov(rtol=1e-13),
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
# Differences of step 1e-6 see an equilibrium solved to 1e-13 as 1e-7 rough, below gradcheck's atol of 1e-5.


def make(options, N=3, **more):
    """A layer, and a function of its input and of every parameter."""
    layer = make_layer(4, 2, **{"gain": 0.5} | options | more)
    names, x = list(dict(layer.named_parameters())), torch.randn(1, N, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    return layer, function, (x, *layer.parameters())


@each_adjoint
@each_layer
def test_gradients_by_differences(options, adjoint):
    _, function, inputs = make(options, adjoint=adjoint, solver=replace(TIGHT, memory=3))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@each_adjoint
@each_layer
def test_second_derivatives_by_differences(options, adjoint):
    _, function, inputs = make(options, adjoint=adjoint, N=2)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_derivatives_entry_by_entry():
    layer = make_layer(2, 2, query_input=True)
    inputs = (torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("solver", TIGHTEST.values(), ids=TIGHTEST)
@pytest.mark.parametrize("options", [LAYERS["queries"], LAYERS["keys-causal"]], ids=["queries", "keys-causal"])
def test_any_solver_solves_the_adjoint(options, solver):
    expected = None
    for adjoint in (Implicit(), Implicit(solver)):
        _, function, inputs = make(options, adjoint=adjoint, N=2)
        found = torch.autograd.grad(function(*inputs).sin().sum(), inputs)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            close(a, array(b), 1e-11)


@pytest.mark.parametrize("solver", TIGHTEST.values(), ids=TIGHTEST)
def test_any_solver_solves_the_adjoint_of_the_adjoint(solver):
    layer = make_layer(2, gain=0.5, query_input=True, adjoint=Implicit(solver))
    x = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize(
    "solver", [Picard(rtol=1e-13, max_steps=300), TIGHT, Broyden(rtol=1e-13, max_steps=300)], ids=str
)
@each_layer
def test_unrolled_and_implicit_agree(options, solver):
    """At the solver's tolerance: the derivative of the iteration converges with the iteration."""
    grads = []
    for adjoint in (Implicit(), Unrolled()):
        _, function, inputs = make(options, adjoint=adjoint, solver=solver)
        grads.append(torch.autograd.grad(function(*inputs).sin().sum(), inputs))
    for a, b in zip(*grads, strict=True):
        close(a, array(b), 1e-7)


def test_checkpointing_changes_nothing():
    grads = []
    for checkpoint in (False, True):
        _, function, inputs = make({}, adjoint=Unrolled(checkpoint))
        grads.append(torch.autograd.grad(function(*inputs).sin().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@each_layer
def test_phantom_approaches_implicit(options):
    def gradients(adjoint):
        _, function, inputs = make(options, adjoint=adjoint)
        return torch.cat([g.flatten() for g in torch.autograd.grad(function(*inputs).sin().sum(), inputs)])

    exact = gradients(Implicit())
    errors = [float((gradients(Phantom(steps, 1.0)) - exact).norm() / exact.norm()) for steps in (1, 4, 60)]
    assert errors[0] > 1e-4  # the one-step gradient is another one
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9
    assert float((gradients(Phantom(200, 0.5)) - exact).norm() / exact.norm()) < 1e-9


def test_phantom_and_unrolled_record_nothing_without_grad():
    for adjoint in (Phantom(), Unrolled(), Implicit()):
        layer, _, (x, *_) = make({}, adjoint=adjoint)
        with torch.no_grad():
            assert not layer(x).requires_grad


def test_one_dimension_by_hand():
    """`y = cos(a y)`: dy/da = -y s / (1 + a s), s = sin(a y); the second derivative by differences of it."""
    a = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)

    def first(a):
        y = fixed_point(lambda y, a: torch.cos(a * y), torch.zeros(1, 1, dtype=torch.float64), (a,), solver=TIGHT).value
        return y, torch.autograd.grad(y, a, create_graph=True)[0]

    y, slope = first(a)
    s = torch.sin(a * y)
    close(slope, array(-y * s / (1 + a * s)), 1e-12)
    curvature = torch.autograd.grad(slope, a)[0]
    up, down = (first((a.detach() + h).requires_grad_())[1] for h in (1e-5, -1e-5))
    close(curvature, array((up - down) / 2e-5), 1e-8)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.register_buffer("factor", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, y, x):
        return torch.tanh(self.factor * self.linear(y) + x)


@each_adjoint
def test_a_module_as_the_map(adjoint):
    cell, x = Cell(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        with torch.no_grad():
            cell.linear.weight.copy_(weight)
            cell.linear.bias.copy_(bias)
        return fixed_point(cell, torch.zeros_like(x), (x,), solver=TIGHT, adjoint=adjoint).value

    function(x, *cell.linear.parameters()).sin().sum().backward()
    found = [x.grad, cell.linear.weight.grad, cell.linear.bias.grad]

    def pure(x, weight, bias):
        y = torch.zeros_like(x)
        for _ in range(200):
            y = torch.tanh(0.5 * (y @ weight.mT + bias) + x)
        return y

    inputs = [t.detach().requires_grad_() for t in (x, *cell.linear.parameters())]
    expected = torch.autograd.grad(pure(*inputs).sin().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        close(a, array(b), 1e-11)


def test_closures_over_parameters_are_refused():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0, x = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    for args, function in (((x,), lambda y, x: weight * y + x), ((), lambda y: torch.cos(weight * y))):
        with pytest.raises(ValueError, match=r"`function` must be a pure function.*closes over.*`args`"):
            fixed_point(function, y0, args)
    with torch.no_grad():  # nothing is lost here
        assert float(fixed_point(lambda y: weight * y + 1, y0).value) == pytest.approx(2.0)


def repelling(adjoint, on_failure):
    """An equilibrium that Newton finds, and whose adjoint the plain iteration does not."""
    a = torch.tensor([[-3.0]], dtype=torch.float64, requires_grad=True)
    y0 = torch.zeros(1, 1, dtype=torch.float64)
    return a, fixed_point(
        lambda y, a: a * y + 1, y0, (a,), solver=NewtonKrylov(), adjoint=adjoint, on_failure=on_failure
    )


@pytest.mark.parametrize("steps", [4, 40], ids=lambda n: f"{n}-steps")
def test_failing_adjoint_is_reported(steps):
    failing = Implicit(Picard(max_steps=steps))
    a, solution = repelling(failing, "raise")
    with pytest.raises(ConvergenceError, match=r"adjoint equation was not solved.*NewtonKrylov"):
        solution.value.sum().backward()
    a, solution = repelling(failing, "warn")
    with pytest.warns(ConvergenceWarning, match="The gradient is not to be trusted"):
        solution.value.sum().backward(retain_graph=True)
    solution.value.sum().backward()  # the second of ten: a warning would be an error here
    a, solution = repelling(failing, "ignore")
    solution.value.sum().backward()
    a, solution = repelling(Implicit(), "raise")
    solution.value.sum().backward()
    assert float(a.grad) == pytest.approx(0.25 / 4)  # d/da of 1 / (1 - a)


def test_failing_adjoint_of_a_second_derivative_is_reported():
    a, solution = repelling(Implicit(Picard(max_steps=4)), "raise")
    with pytest.raises(ConvergenceError, match="adjoint equation"):
        torch.autograd.grad(solution.value.sum(), a, create_graph=True)


def test_each_layer_warns_for_itself_and_not_at_every_call():
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    layers = [make_layer(4, solver=Picard(max_steps=1), on_failure="warn") for _ in range(2)]
    for layer in layers:
        with pytest.warns(ConvergenceWarning, match="equilibrium was not solved.*Said again at the 10th"):
            y = layer(x)
        with pytest.warns(ConvergenceWarning, match="adjoint equation was not solved"):
            y.sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x).sum().backward()
    quiet = make_layer(4, solver=Picard(max_steps=1), on_failure="ignore")
    quiet(x).sum().backward()
    with pytest.raises(ConvergenceError):
        make_layer(4, solver=Picard(max_steps=1), on_failure="raise")(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_cotangent_that_is_not_finite_stays_so_and_stays_in_its_sample(bad):
    """NaN in, NaN out, as everywhere in autograd; what the other samples get is right or not a number either."""
    layer = make_layer(4, 2, gain=0.5, query_input=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    grad = torch.ones_like(x)
    grad[0, 1, 2] = bad
    found = torch.autograd.grad(layer(x), (x, layer.W_K.weight), grad)
    assert not bool(found[0][0].isfinite().all())
    assert not bool(found[1].isfinite().all())
    other = found[0][1]
    assert not bool(other.isfinite().any()) or torch.allclose(other, expected[1], rtol=0.0, atol=1e-10)


DIRECT = {
    "causal": {"is_causal": True, "positions": "alibi", "qk_norm": True},
    "causal-torch": {"is_causal": True, "positions": "relative", "solver": ForwardSubstitution(kernel="torch")},
    "encoder": {"query_input": True, "max_gain": 0.9, "positions": "relative"},
    "keys": {"normalize_over": "keys", "query_input": True, "max_gain": 0.9, "positions": "rope"},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a graph ends
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", DIRECT.values(), ids=DIRECT)
def test_a_broken_cotangent_breaks_all_shared_gradients_and_no_other_sample(options, compiled):
    """As many samples as rows of each weight: what is shared is not told from its shape. Nothing is reported."""
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(8, 2, on_failure="raise", **options)
    x, mask = torch.randn(8, 5, 8), torch.randn(8, 2, 5, 5)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    grad = torch.randn(8, 5, 8)
    grad[3, 1, 2] = math.nan
    found = []
    for cotangent in (grad, grad.nan_to_num(0.0)):
        leaf, seen = x.clone().requires_grad_(), mask.clone().requires_grad_()
        shared = [p for p in layer.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(call(leaf, attn_mask=seen), (leaf, seen, *shared), cotangent))
    (own, own_mask, *shared), (wanted, wanted_mask, *_) = found
    others = torch.arange(8) != 3
    assert own[3].isnan().all()
    assert own_mask[3].isnan().all()
    assert torch.equal(own[others], wanted[others])
    assert torch.equal(own_mask[others], wanted_mask[others])
    assert all(g.isnan().all() for g in shared)


def test_backward_twice_through_one_solve():
    layer, _, (x, *_) = make({})
    y = layer(x)
    first, second = (torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_zero_cotangent_gives_zero_gradients():
    layer, _, (x, *parameters) = make({})
    layer(x).backward(torch.zeros(1, 3, 4, dtype=torch.float64))
    assert all(bool((t.grad == 0).all()) for t in (x, *parameters))
