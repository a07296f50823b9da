"""Forward substitution against the oracle and the iterative solvers, and the row problems it rests on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention import (
    Anderson,
    ConvergenceWarning,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
)
from tests import oracle
from tests.bridge import make_layer

F64 = torch.float64
OPTIONS = {
    "one_head": {"num_heads": 1},
    "heads": {"num_heads": 2},
    "bias": {"num_heads": 2, "bias": True},
    "query_input": {"num_heads": 2, "query_input": True, "bias": True},
    "qk_norm": {"num_heads": 2, "qk_norm": True},
    "qk_norm-rope": {"num_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True},
    "rope": {"num_heads": 2, "positions": "rope"},
    "alibi": {"num_heads": 2, "positions": "alibi"},
    "relative": {"num_heads": 2, "positions": "relative"},
    "input": {"num_heads": 2, "self_query": "input"},
    "input-relative": {"num_heads": 2, "self_query": "input", "positions": "relative"},
    "identity": {"num_heads": 2, "values": "identity"},
    "dropout": {"num_heads": 2, "dropout": 0.3},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "positions": "rope"},
    "groups-relative": {"num_heads": 4, "num_kv_heads": 1, "positions": "relative", "query_input": True},
    "groups-input": {"num_heads": 4, "num_kv_heads": 2, "self_query": "input"},
    "window": {"num_heads": 2, "window": 3},
    "window-groups-alibi": {"num_heads": 4, "num_kv_heads": 2, "window": 6, "positions": "alibi"},
    "window-input": {"num_heads": 2, "window": 5, "self_query": "input", "qk_norm": True},
    "scale": {"num_heads": 2, "scale": 0.9},
}


def layer_and_input(options, n, *, gain=1.0, block=4, batch=2, seed=0):
    layer = make_layer(
        8, is_causal=True, gain=gain, seed=seed, **({"solver": ForwardSubstitution(block=block)} | options)
    )
    x = torch.randn(batch, n, 8, dtype=F64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return layer, x


def value_and_gradients(layer, x, solver, **inputs):
    layer.solver = solver
    torch.manual_seed(7)  # of the dropout masks
    solution = layer.solve(x, **inputs)
    cotangent = torch.randn(solution.value.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad((solution.value * cotangent).sum(), leaves, allow_unused=True)
    return solution, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def close(a, b, tolerance):
    scale = max(1.0, float(b.detach().abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 13], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("name", OPTIONS)
def test_same_as_iterating(name, n):
    """At small weights all solvers find the one equilibrium; adjoints too, by entirely different ways."""
    layer, x = layer_and_input(OPTIONS[name], n)
    exact, exact_grads = value_and_gradients(layer, x, ForwardSubstitution(block=4))
    other, grads = value_and_gradients(layer, x, Anderson(rtol=1e-13, atol=1e-13, max_steps=300))
    assert bool(exact.converged.all())
    close(exact.value, other.value, 1e-9)
    for a, b in zip(exact_grads, grads, strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("gain", [3.0, 10.0, 30.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_hard_weights_are_solved_to_rounding(name, gain):
    layer, x = layer_and_input(OPTIONS[name], 33, gain=gain)
    layer.solver = ForwardSubstitution(block=4, rtol=1e-15, atol=1e-12)
    with torch.no_grad():
        solution = layer.solve(x)
        equation = layer.equation(x)
        residual = (equation.function(solution.value, *equation.args) - solution.value).abs().amax(-1)
    assert bool(solution.converged.all())
    if not layer.dropout:  # another equation has other dropout masks
        torch.testing.assert_close(residual, solution.residual, rtol=0, atol=1e-14)
        assert float(residual.max()) < 1.1e-12


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_one_head_finds_the_root_of_the_oracle(gain):
    """Row by row from p = 1, the largest root: the oracle's bisection between turning points."""
    layer, x = layer_and_input({"num_heads": 1}, 21, gain=gain)
    problem = oracle.Problem(
        x=x.detach().numpy(),
        omega_q=layer.Omega_Q.weight.detach().numpy(),
        w_k=layer.W_K.weight.detach().numpy(),
        omega_v=layer.Omega_V.weight.detach().numpy(),
        is_causal=True,
    )
    np.testing.assert_allclose(layer.solve(x).value.detach().numpy(), oracle.solve_rows(problem), atol=1e-9)


@given(
    n=st.integers(1, 20),
    block=st.integers(1, 9),
    name=st.sampled_from(["heads", "qk_norm-rope", "relative", "input", "dropout", "groups", "window-groups-alibi"]),
    masked=st.booleans(),
    padded=st.booleans(),
)
def test_block_size_does_not_matter(n, block, name, masked, padded):
    layer, x = layer_and_input(OPTIONS[name], n, gain=4.0)
    chance = torch.Generator().manual_seed(n)
    inputs = {}
    if masked:
        inputs["attn_mask"] = torch.rand(n, n, generator=chance) < 0.3
    if padded:
        inputs["key_padding_mask"] = torch.rand(2, n, generator=chance) < 0.3
    one, one_grads = value_and_gradients(layer, x, ForwardSubstitution(block=block), **inputs)
    two, two_grads = value_and_gradients(layer, x, ForwardSubstitution(block=64), **inputs)
    close(one.value, two.value, 1e-8)
    for a, b in zip(one_grads, two_grads, strict=True):
        close(a, b, 1e-5)  # gains near 1 magnify the last digits of the equilibrium


def test_groups_are_heads_that_repeat():
    """Shared heads of queries and values are as many heads with equal weights."""
    layer, x = layer_and_input({"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "query_input": True}, 11)
    whole, _ = layer_and_input({"num_heads": 4, "qk_norm": True, "query_input": True}, 11)
    state = layer.state_dict()
    for name in ("Omega_Q.weight", "W_Q.weight", "Omega_V.weight"):
        state[name] = state[name].view(2, 2, 8).repeat_interleave(2, 0).reshape(8, 8)
    whole.load_state_dict(state)
    close(layer.solve(x).value, whole.solve(x).value, 1e-9)


@pytest.mark.parametrize("options", [{}, {"self_query": "input"}, {"normalize_over": "keys", "query_input": True}])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_window_is_a_mask(window, options):
    layer, x = layer_and_input({"num_heads": 2, "window": window, "solver": "auto"} | options, 37, block=8)
    whole, _ = layer_and_input({"num_heads": 2, "solver": "auto"} | options, 37, block=8)
    distance = torch.arange(37)[:, None] - torch.arange(37)
    close(layer.solve(x).value, whole.solve(x, attn_mask=distance >= window).value, 1e-8)


def test_a_row_does_not_depend_on_its_batch_or_on_what_follows():
    layer, x = layer_and_input({"num_heads": 2}, 24, gain=6.0, batch=3)
    with torch.no_grad():
        whole = layer.solve(x).value
        close(layer.solve(x[1:2]).value, whole[1:2], 1e-8)
        close(layer.solve(x[:, :11]).value, whole[:, :11], 1e-8)


def test_float32_rows_are_within_tolerance():
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(64, 4, is_causal=True, qk_norm=True, on_failure="raise")
    with torch.no_grad():
        layer.temperature.mul_(3.0)
        solution = layer.solve(torch.randn(4, 100, 64))
    assert bool(solution.converged.all())
    assert solution.residual.shape == solution.steps.shape == (4, 100)


def test_transforms_and_second_derivatives():
    layer, x = layer_and_input({"num_heads": 2}, 5, batch=2)
    x = x.detach()
    rows = torch.func.vmap(layer)(x)
    close(rows, layer(x), 1e-12)
    jacobian = torch.func.jacrev(layer)(x)
    close(jacobian, torch.autograd.functional.jacobian(layer, x), 1e-8)
    assert torch.autograd.gradgradcheck(layer, x[:1, :3].clone().requires_grad_(), fast_mode=True)


def test_as_the_adjoint_of_another_solver():
    for name in ("heads", "qk_norm-rope", "input-relative"):
        layer, x = layer_and_input(OPTIONS[name], 9)
        _, expected = value_and_gradients(layer, x, ForwardSubstitution(block=4))
        layer.adjoint = Implicit(ForwardSubstitution(block=4))
        _, grads = value_and_gradients(layer, x, Anderson(rtol=1e-13, atol=1e-13, max_steps=300))
        for a, b in zip(grads, expected, strict=True):
            close(a, b, 1e-8)


def test_refused_where_it_cannot_work():
    for options in ({}, {"is_causal": True, "normalize_over": "keys"}):
        with pytest.raises(ValueError, match=r"`solver` must be an iterative one"):
            ImplicitQueryAttention(8, solver=ForwardSubstitution(), **options)
    with pytest.raises(ValueError, match="`block`"):
        ForwardSubstitution(block=0)
    with pytest.raises(TypeError, match="`fallback`"):
        ForwardSubstitution(fallback=ForwardSubstitution())
    layer = ImplicitQueryAttention(8, adjoint=Implicit(ForwardSubstitution()), solver=NewtonKrylov())
    with pytest.raises(ValueError, match=r"`solver`.*iterates on the whole map"):
        layer(torch.randn(2, 3, 8)).sum().backward()


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_gradient_at_a_fold_is_reported(kernel):
    """Where two roots meet the gain is 1 and the derivative does not exist; the gradient there comes with a warning."""
    layer = make_layer(
        1, is_causal=True, scale=1.0, on_failure="warn", solver=ForwardSubstitution(atol=1e-14, kernel=kernel)
    )
    with torch.no_grad():
        for parameter, value in ((layer.Omega_Q.weight, 8.0), (layer.W_K.weight, 1.0), (layer.Omega_V.weight, 1.0)):
            parameter.fill_(value)  # p = sigmoid(16 p + bias), of which two roots meet near bias = -12.5
    x = torch.tensor([[[-1.0], [1.0]]], dtype=F64, requires_grad=True)
    mask = torch.zeros(2, 2, dtype=F64)

    def solved(bias):
        mask[1, 1] = bias
        return layer.solve(x, attn_mask=mask, gains=True)

    low, high = -13.0, -12.0
    for _ in range(36):
        middle = (low + high) / 2
        low, high = (low, middle) if solved(middle).value[0, 1, 0].item() > 0 else (middle, high)
    solution = solved(high)
    assert abs(solution.gain[0, 1].item() - 1.0) < 1e-3
    with pytest.warns(
        ConvergenceWarning, match=r"gradient is not to be trusted: 1 of 2 rows have an eigenvalue within 1e-3"
    ):
        solution.value.sum().backward()
    layer = make_layer(4, 2, is_causal=True, on_failure="raise")  # an ordinary one says nothing
    layer(torch.randn(2, 9, 4, dtype=F64)).sum().backward()
