"""The seed's layer against NumPy: outputs, history, gradients; and its state dict against the seed's own class."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_attention import ImplicitQueryAttentionLinearV
from tests import oracle
from tests.bridge import array, close

# What the issue asks for; float64 leaves 1e-16 and float32 6e-8 per rounding, ten steps and sums of N terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = [(1, 1, 8, 10), (2, 4, 8, 10), (2, 7, 3, 10), (1, 63, 16, 10), (1, 64, 16, 3), (2, 65, 16, 1), (1, 1000, 8, 4)]
WEIGHTS = {"omega_q": "Omega_Q", "w_k": "W_K", "omega_v": "Omega_V"}

sizes = pytest.mark.parametrize(("B", "N", "D", "T"), SIZES, ids=[f"B{b}-N{n}-D{d}-T{t}" for b, n, d, t in SIZES])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


class Seed(nn.Module):
    """The class as it was first written, word for word."""

    def __init__(self, embed_dim, n_iters=10):
        super().__init__()
        self.embed_dim = embed_dim
        self.n_iters = n_iters
        # Linear transforms
        self.Omega_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.Omega_V = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x, track=False):
        K = self.W_K(x)  # Keys from input
        V = self.Omega_V(x)  # Values from input
        y = V.clone()  # Initialize y with V
        y_history = [y.clone()] if track else None

        for _ in range(self.n_iters):
            Q = self.Omega_Q(y)  # Queries depend on output y
            attn_scores = torch.matmul(K, Q.transpose(-2, -1)) / (self.embed_dim**0.5)
            attn_probs = F.softmax(attn_scores, dim=-1)
            y = torch.matmul(attn_probs, V)  # Apply linear values
            if track:
                y_history.append(y.clone())

        return (y, y_history) if track else y


class CountClones(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.clones = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.clones += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def make(dtype, D, T):
    layer = ImplicitQueryAttentionLinearV(D, n_iters=T).to(dtype)
    with torch.no_grad():  # larger than the initialisation, so that ten steps move visibly
        for weight in layer.parameters():
            weight.mul_(2.0)
    return layer, {name: array(getattr(layer, module).weight) for name, module in WEIGHTS.items()}


@dtypes
@sizes
def test_outputs_and_history_equal_the_oracle(B, N, D, T, dtype):
    layer, weights = make(dtype, D, T)
    x = torch.randn(B, N, D, dtype=dtype)
    y, history = layer(x, track=True)
    expected, expected_history = oracle.seed_forward(array(x), **weights, n_iters=T)
    close(y, expected, TOLERANCE[dtype])
    assert len(history) == T + 1
    for found, wanted in zip(history, expected_history, strict=True):
        close(found, wanted, TOLERANCE[dtype])
    assert y.dtype == dtype


@dtypes
@sizes
def test_gradients_equal_the_oracle(B, N, D, T, dtype):
    layer, weights = make(dtype, D, T)
    x = torch.randn(B, N, D, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(B, N, D, dtype=dtype)
    layer(x).backward(grad_y)
    expected = oracle.seed_backward(array(x), **weights, n_iters=T, grad_y=array(grad_y))
    close(x.grad, expected["x"], TOLERANCE[dtype])
    for name, module in WEIGHTS.items():
        close(getattr(layer, module).weight.grad, expected[name], TOLERANCE[dtype])


def test_gradient_flows_from_every_iterate_of_the_history():
    layer, _ = make(torch.float64, 4, 3)
    seed = Seed(4, 3).double()
    seed.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    for i in range(4):
        found, wanted = (torch.autograd.grad(m(x, track=True)[1][i].sin().sum(), x)[0] for m in (layer, seed))
        close(found, array(wanted), 1e-12)


def test_state_dict_loads_both_ways():
    layer, seed = ImplicitQueryAttentionLinearV(8, 10).double(), Seed(8, 10).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    assert list(layer.state_dict()) == list(seed.state_dict())
    for target, source in ((layer, seed), (seed, ImplicitQueryAttentionLinearV(8).double())):
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        close(target(x), array(source(x)), 1e-12)


def test_same_random_state_gives_the_same_layer():
    torch.manual_seed(3)
    layer = ImplicitQueryAttentionLinearV(8)
    torch.manual_seed(3)
    seed = Seed(8)
    assert layer.n_iters == seed.n_iters == 10
    assert layer.embed_dim == seed.embed_dim == 8
    for found, wanted in zip(layer.parameters(), seed.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_history_costs_nothing_when_off():
    layer, _ = make(torch.float32, 8, 10)
    x = torch.randn(2, 5, 8)
    counts = {}
    for track in (False, True):
        with CountClones() as counter:
            out = layer(x, track=track)
        counts[track] = counter.clones
    assert counts == {False: 0, True: 11}  # V and ten iterates
    assert torch.equal(layer(x), out[0])


def test_history_is_the_callers_own():
    layer, _ = make(torch.float64, 8, 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        y, history = layer(x, track=True)
        before = y.clone()
        for t in history:
            t.zero_()
    assert torch.equal(y, before)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 2), (0,)], ids=["none", "3", "2x3", "2x1x2", "empty"])
def test_leading_dimensions(lead):
    layer, weights = make(torch.float64, 4, 3)
    x = torch.randn(*lead, 5, 4, dtype=torch.float64)
    y, history = layer(x, track=True)
    expected, _ = oracle.seed_forward(array(x), **weights, n_iters=3)
    close(y, expected, 1e-12)
    assert {t.shape for t in history} == {x.shape}


def test_non_contiguous_input():
    layer, weights = make(torch.float64, 4, 3)
    x = torch.randn(4, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    close(layer(x), oracle.seed_forward(array(x), **weights, n_iters=3)[0], 1e-12)


def test_no_iteration_returns_the_values():
    layer, weights = make(torch.float64, 4, 0)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    y, history = layer(x, track=True)
    close(y, array(x) @ weights["omega_v"].T, 1e-15)
    assert len(history) == 1
    y.sum().backward()
    close(x.grad, np.broadcast_to(weights["omega_v"].sum(0), x.shape), 1e-14)


def test_second_derivatives():
    layer, _ = make(torch.float64, 3, 2)
    x = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_settings_are_shown():
    assert "embed_dim=8, n_iters=3" in repr(ImplicitQueryAttentionLinearV(8, 3))
