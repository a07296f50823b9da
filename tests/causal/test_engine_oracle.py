"""The causal engine against the oracle's row-by-row solution, outputs and gradients, over combinations of options."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_attention import ForwardSubstitution
from implicit_attention.causal import cpu
from tests import oracle
from tests.bridge import array, close, make_layer, oracle_gradients, problem_of

D = 8
VALUE, GRADIENT = 1e-10, 1e-8  # both sides are solved to 1e-13; gains below 1 - 1e-3 magnify that a thousandfold

options = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2, 4]),
        "self_query": st.sampled_from(["output", "output", "input"]),
        "query_input": st.booleans(),
        "qk_norm": st.booleans(),
        "positions": st.sampled_from([None, "rope", "alibi", "relative"]),
        "values": st.sampled_from(["linear", "linear", "identity"]),
        "bias": st.booleans(),
        "window": st.sampled_from([None, None, 2, 4]),
    }
)


def make(options, n, seed, gain=1.0):
    solver = ForwardSubstitution(block=3, rtol=1e-15, atol=1e-13)
    layer = make_layer(D, is_causal=True, seed=seed, gain=gain, **options | {"solver": solver})
    x = torch.randn(2, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return layer, x


def masks(n, masked, padded):
    chance = torch.Generator().manual_seed(n)
    found = {}
    if masked == "bool":
        found["attn_mask"] = torch.rand(n, n, generator=chance) < 0.3
    if masked == "float":
        found["attn_mask"] = torch.randn(4, n, n, generator=chance, dtype=torch.float64)
    if padded:
        found["key_padding_mask"] = torch.rand(2, n, generator=chance) < 0.3
    return found


@settings(max_examples=40)
@given(options=options, n=st.integers(1, 8), seed=st.integers(0, 5), masked=st.sampled_from([None, "bool"]),
       padded=st.booleans())  # fmt: skip
def test_outputs_and_gradients(options, n, seed, masked, padded):
    layer, x = make(options, n, seed)
    inputs = masks(n, masked, padded)
    problem = problem_of(layer, x, **inputs)
    solution = layer.solve(x, gains=True, **inputs)
    expected = oracle.solve_rows(problem)
    close(solution.value, expected, VALUE)
    if float(solution.gain.detach().sub(1.0).abs().min()) < 1e-2:
        return  # so near a fold, two ways of rounding differ by more than GRADIENT
    cotangent = np.random.default_rng(seed).standard_normal(expected.shape)
    wanted = oracle_gradients(layer, problem, expected, cotangent)
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((solution.value * torch.from_numpy(cotangent)).sum(), list(leaves.values()),
                                allow_unused=True)  # fmt: skip
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        if name in wanted:
            close(torch.zeros_like(leaf) if grad is None else grad, wanted[name].reshape(leaf.shape), GRADIENT)


@pytest.mark.parametrize("gain", [3.0, 10.0, 30.0])
@pytest.mark.parametrize(
    "options", [{}, {"num_heads": 2}, {"num_heads": 4}, {"num_heads": 2, "qk_norm": True}], ids=str
)
def test_hard_rows_find_the_root_of_the_oracle(options, gain):
    """Where rows have several roots too, the one that comes back is the one that is defined."""
    layer, x = make(options, 12, seed=1, gain=gain)
    if layer.qk_norm:
        with torch.no_grad():
            layer.temperature.fill_(gain / 3)
    close(layer.solve(x).value, oracle.solve_rows(problem_of(layer, x)), 1e-7)  # 1e-13 over (1 - gain)


@given(options=options, heads=st.sampled_from([(2, 1), (4, 2), (4, 1)]), n=st.integers(1, 8), seed=st.integers(0, 3))
def test_groups_of_heads(options, heads, n, seed):
    """The oracle knows no groups: it gets as many heads with equal weights."""
    count, groups = heads
    options = options | {"num_heads": count, "values": "linear"}
    layer, x = make(options | {"num_kv_heads": groups}, n, seed)
    whole, _ = make(options, n, seed)
    state = layer.state_dict()
    for name in ("Omega_Q", "W_Q", "Omega_V"):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                t = state[f"{name}.{part}"]
                t = t.view(groups, -1, *t.shape[1:]).repeat_interleave(count // groups, 0)
                state[f"{name}.{part}"] = t.reshape(D, *t.shape[2:])
    whole.load_state_dict(state)
    problem = problem_of(whole, x)
    value = layer.solve(x).value
    expected = oracle.solve_rows(problem)
    close(value, expected, VALUE)
    cotangent = np.random.default_rng(seed).standard_normal(expected.shape)
    (found,) = torch.autograd.grad((value * torch.from_numpy(cotangent)).sum(), x)
    close(found, oracle.gradient(problem, expected, cotangent, wrt=["x"])["x"], GRADIENT)


@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 5), (2, 2, 5, 5)], ids=str)
def test_a_float_mask_gets_its_gradient(shape):
    """`[N, N]`, `[B * H, N, N]`, `[B, H, N, N]`: the cotangent of the scores, summed over what shares an entry."""
    layer, x = make({"num_heads": 2}, 5, seed=0)
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    problem = problem_of(layer, x, attn_mask=mask)
    value = layer.solve(x, attn_mask=mask).value
    (found,) = torch.autograd.grad(value.sin().sum(), mask)
    wanted = oracle.gradient(problem, array(value), np.cos(array(value)), wrt=["score_bias"])["score_bias"]
    wanted = wanted.sum((0, 1)) if len(shape) == 2 else wanted.reshape(shape)
    close(found, np.tril(wanted), GRADIENT)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_of_several_roots_the_start_decides(heads):
    """Rows that hold on to themselves, or to what came before: from y = v they hold on to themselves."""
    layer, x = make({"num_heads": heads}, 9, seed=heads)
    own = torch.diag(torch.linspace(-14.0, -6.0, 9, dtype=torch.float64))  # makes rows hesitate, more and less
    with torch.no_grad():
        for weight, size in ((layer.Omega_Q.weight, 12.0), (layer.W_K.weight, 1.0), (layer.Omega_V.weight, 1.0)):
            weight.copy_(size * torch.eye(D))
    problem = problem_of(layer, x, attn_mask=own)
    found = layer.solve(x, attn_mask=own).value
    close(found, oracle.solve_rows(problem), 1e-9)
    other = np.zeros_like(array(found))
    for _ in range(200):  # plain iteration from elsewhere finds another equilibrium
        other = oracle.apply(problem, other)
    assert np.abs(other - array(found)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "gain"), [({"num_heads": 2}, 9.0), ({"num_heads": 4, "qk_norm": True}, 3.0)], ids=str
)
def test_the_root_of_a_row_depends_on_the_row_alone(options, gain):
    """Not on how the sweeps over its block came there: 512 sequences, by kernel and width of blocks."""
    layer, _ = make(options, 1, seed=1, gain=gain)
    x = 2.0 * torch.randn(512, 24, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, ways = [], [("torch", 1), ("torch", 64)] + [("cpp", 64)] * (cpu.problem() is None)
    for kernel, block in ways:
        layer.solver = ForwardSubstitution(kernel=kernel, block=block, rtol=1e-15, atol=1e-13)
        with torch.no_grad():
            found.append(layer.solve(x).value)
    for other in found[1:]:
        off = (other - found[0]).abs().amax(-1) > 1e-5  # 1e-13, and rows near a fold magnify it up to 1e8 times
        assert not off.any(), off.nonzero()[:3].tolist()
