"""`values="feedback"`: every option against the loop over rows, in torch and in C++; state over long sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention import Anderson, ForwardSubstitution, ImplicitQueryAttention, Phantom, Picard, Unrolled
from implicit_attention.causal.cpu import engine
from implicit_attention.errors import NonFiniteError
from tests.bridge import make_layer
from tests.causal import feedback_oracle

F64 = torch.float64
KERNELS = ["torch", "cpp"]
FEEDBACK = {"is_causal": True, "self_query": "input", "values": "feedback"}
OPTIONS = {
    "one-head": {"num_heads": 1},
    "heads": {"num_heads": 4},
    "norm-rope": {"num_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True},
    "groups-bias": {"num_heads": 4, "num_kv_heads": 2, "bias": True, "positions": "alibi"},
    "only-values": {"num_heads": 2, "query_input": True, "query_output": False, "qk_norm": True, "bias": True},
    "relative-window": {"num_heads": 2, "positions": "relative", "window": 20, "feedback_norm": False},
    "dropout": {"num_heads": 2, "dropout": 0.3, "query_input": True},
}


def make(options, n, *, size=8, batch=2, seed=0, kernel="cpp", block=16):
    options = {"num_heads": 2} | options
    layer = make_layer(size, seed=seed, **FEEDBACK, **options, solver=ForwardSubstitution(kernel=kernel, block=block))
    x = torch.randn(batch, n, size, dtype=F64, generator=torch.Generator().manual_seed(seed + 1), requires_grad=True)
    return layer, x


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("where", "n"), [("x", 1), ("x", 40), ("W_K", 9), ("W_K", 40), ("Omega_Q", 9)])
def test_rows_whose_every_score_is_nan_are_no_rows_without_columns(where, n, kernel):
    """A row that sees no column is zero: NaN must not pass for a score of minus infinity."""
    layer, x = make({"num_heads": 2}, n, kernel=kernel)
    with torch.no_grad():
        if where == "x":
            x[0, -1] = torch.nan
        else:
            layer.get_submodule(where).weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        layer(x)


def with_gradients(layer, x, value):
    cotangent = torch.randn(value.shape, dtype=F64, generator=torch.Generator().manual_seed(5)).to(value.dtype)
    leaves = {"x": x} | dict(layer.named_parameters())
    found = torch.autograd.grad(value, list(leaves.values()), cotangent, allow_unused=True)
    grads = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}
    return {"y": value.detach(), **grads}


def found(layer, x, **masks):
    torch.manual_seed(7)  # of the dropout masks
    return with_gradients(layer, x, layer.solve(x, **masks).value)


def expected(layer, x, hidden=None):
    torch.manual_seed(7)
    everything = slice(0, x.shape[1])
    function, args, _ = layer.equation(x.detach())
    seeds = dict(zip(function.names, args, strict=True)).get("seeds")
    keep = function.spec.keep(seeds, layer.num_heads, everything, everything, x)
    return with_gradients(layer, x, feedback_oracle.outputs(layer, x, hidden=hidden, keep=keep))


def close(found, expected, tolerance):
    for name, wanted in expected.items():
        size = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found[name].to(F64), wanted, rtol=0, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_the_oracles(name, kernel):
    layer, x = make(OPTIONS[name], 37, kernel=kernel)
    close(found(layer, x), expected(layer, x), 1e-11)


@given(
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]),
    queries=st.sampled_from([(False, True), (True, True), (True, False)]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    positions=st.sampled_from([None, "rope", "alibi", "relative"]),
    window=st.sampled_from([None, 1, 2, 7, 30]),
    dropout=st.sampled_from([0.0, 0.3]),
    masked=st.sampled_from([None, "padding", "mask"]),
    n=st.integers(1, 40),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 1000),
)
def test_every_combination_of_options(heads, queries, flags, positions, window, dropout, masked, n, kernel, seed):
    options = {"num_heads": heads[0], "num_kv_heads": heads[1], "query_input": queries[0], "query_output": queries[1],
               "qk_norm": flags[0], "feedback_norm": flags[1], "bias": flags[2], "positions": positions,
               "window": window, "dropout": dropout}  # fmt: skip
    layer, x = make(options, n, kernel=kernel, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    masks, hidden = {}, None
    if masked == "padding":
        masks["key_padding_mask"] = padding = torch.rand(2, n, generator=generator) < 0.3
        hidden = padding[:, None, None, :].expand(-1, -1, n, -1)
    if masked == "mask":
        masks["attn_mask"] = mask = torch.rand(2 * heads[0], n, n, generator=generator) < 0.4
        hidden = mask.view(2, heads[0], n, n)
    close(found(layer, x, **masks), expected(layer, x, hidden), 1e-10)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 300], ids=lambda n: f"N{n}")
@pytest.mark.usefixtures("poisoned")
def test_lengths_around_the_edges_of_blocks(n, monkeypatch):
    monkeypatch.setattr(engine, "_WIDEST", 128)  # so that there are columns before a call
    layer, x = make({"qk_norm": True, "positions": "rope", "num_kv_heads": 1}, n, batch=3, block=64)
    close(found(layer, x), expected(layer, x), 1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["norm-rope", "relative-window", "only-values"])
def test_float32_is_as_exact_as_the_oracle_in_float32(name, kernel):
    layer, x = make(OPTIONS[name], 70, kernel=kernel)
    exact = expected(layer, x)
    narrow, given = layer.float(), x.detach().float().requires_grad_()
    rounded, got = expected(narrow, given), found(narrow, given)
    for name, wanted in exact.items():
        rounding = float((rounded[name] - wanted).abs().max()) + float(wanted.abs().max()) * 2**-23
        assert float((got[name] - wanted).abs().max()) <= 8 * rounding, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_types(dtype, kernel):
    layer, x = make({"qk_norm": True, "positions": "rope"}, 40, kernel=kernel)
    exact = found(layer, x)
    got = found(layer.to(dtype), x.detach().to(dtype).requires_grad_())
    for name, wanted in exact.items():  # some roundings of a unit each
        assert float((got[name] - wanted).abs().max()) <= 32 * torch.finfo(dtype).eps * float(wanted.abs().max()), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_depends_on_earlier_rows_and_its_sample_alone(kernel):
    layer, x = make({"qk_norm": True, "positions": "rope", "num_heads": 4}, 90, batch=6, kernel=kernel)
    with torch.no_grad():
        whole = layer(x)
        torch.testing.assert_close(layer(x[:, :50]), whole[:, :50], rtol=0, atol=1e-12)
        assert torch.equal(layer(x[2:3]), whole[2:3]) or kernel == "torch"  # bit by bit


def parity_layer(length, dtype, kernel, *, feedback_norm):
    """Weights by hand: y holds the parity so far, as 1 or -1, in head 0 if the bit is 0, and in head 1 if it is 1.

    An input says which bit it is and whether its position is even. A row with bit 0 lets head 0 look at the row before
    it and head 1 at itself, where the value is zero; a row with bit 1 the other way round. The state is head 0 less
    head 1. The first row's own value starts it.
    """
    layer = ImplicitQueryAttention(
        8, 2, **FEEDBACK, query_input=True, query_output=False, window=2, scale=1.0, feedback_norm=feedback_norm,
        dtype=dtype, solver=ForwardSubstitution(kernel=kernel),
    )  # fmt: skip
    with torch.no_grad():
        for weight in (layer.W_Q.weight, layer.W_K.weight, layer.Omega_V.weight, layer.Psi_V.weight):
            weight.zero_()
        for head in (0, 1):
            for bit in (0, 1):
                for odd in (0, 1):
                    token = 2 * bit + odd
                    layer.W_Q.weight[4 * head + odd, token] = 1.0
                    before, own = 1 - odd, odd
                    layer.W_K.weight[4 * head + (before if bit == head else own), token] = 200.0
            state = (
                8**-0.5 if feedback_norm else 1.0
            )  # one of 8 numbers is not zero: its norm is sqrt(8) times as large
            layer.Psi_V.weight[4 * head, 0], layer.Psi_V.weight[4 * head, 4] = state, -state
            layer.Omega_V.weight[4 * head, 4] = layer.W_Q.weight[4 * head, 4] = 1.0  # of the first token alone
    return layer


@pytest.mark.parametrize("feedback_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_through_512_rows_is_exact(kernel, dtype, feedback_norm):
    layer = parity_layer(512, dtype, kernel, feedback_norm=feedback_norm)
    bits = torch.randint(2, (3, 512))
    bits[:, 0] = 0
    x = torch.zeros(3, 512, 8, dtype=dtype)
    x.scatter_(2, (2 * bits + torch.arange(512) % 2)[..., None], 1.0)
    x[:, 0] = torch.eye(8, dtype=dtype)[4]  # begin: both heads hold 1, which is 0 in the state
    x.requires_grad_()
    y = layer(x)
    state = y[..., 0] - y[..., 4]
    parity = 1 - 2 * (bits.cumsum(1) % 2)
    torch.testing.assert_close(state[:, 1:], parity[:, 1:].to(dtype), rtol=0, atol=1e-5 if feedback_norm else 0)
    (through,) = torch.autograd.grad(state[:, -1].sum(), x)  # the state of the last row is that of the first, turned
    torch.testing.assert_close(
        through[:, 0, 4], parity[:, -1].to(dtype) * (0 if feedback_norm else 1), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_feedback_is_the_layer_without(kernel):
    options = {"is_causal": True, "self_query": "input", "qk_norm": True, "positions": "rope", "dtype": F64}
    torch.manual_seed(1)
    plain = ImplicitQueryAttention(8, 2, **options)
    torch.manual_seed(1)
    layer = ImplicitQueryAttention(8, 2, **options, values="feedback", solver=ForwardSubstitution(kernel=kernel))
    x = torch.randn(2, 30, 8, dtype=F64)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_norm_bounds_outputs(kernel):
    """`|y| <= max |v| + |Psi_V| sqrt(D)`: no length makes it larger. Without the norm outputs grow."""
    sizes = {}
    for norm in (True, False):
        layer, x = make({"feedback_norm": norm, "window": 2}, 100, kernel=kernel)
        with torch.no_grad():
            layer.Psi_V.weight.copy_(3.0 * torch.eye(8))
            sizes[norm] = float(layer(x).norm(dim=-1).max())
            bound = float(layer.Omega_V(x).norm(dim=-1).max()) + 3.0 * 8**0.5
    assert sizes[True] <= 2 * bound  # of each head by itself
    assert sizes[False] > 100 * bound


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_with_a_cache(dtype, compiled):
    layer, x = make({"num_heads": 2, "positions": "rope"}, 20)
    layer, x = layer.to(dtype), x.to(dtype)
    cache, step = layer.make_cache(2, 20), torch.compile(layer, backend="aot_eager") if compiled else layer
    found = torch.cat([step(x[:, low:high], cache=cache) for low, high in ((0, 9), (9, 14), (14, 15), (15, 20))], 1)
    assert cache.column.dtype == dtype
    expected = layer(x)
    allowed = 8 * torch.finfo(dtype).eps * float(expected.abs().max())  # each column is rounded once more
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1e19, 3e19, 1e25])
def test_outputs_too_large_for_their_norm_are_refused(size, kernel):
    """Their squares overflow, so what `Psi_V` reads would be zero."""
    layer, x = make({"num_heads": 2}, 5, kernel=kernel)
    layer, x = layer.float(), x.detach().float()
    with torch.no_grad():
        layer.Omega_V.weight.mul_(size)
        cache = layer.make_cache(2, 5)
        for inputs in (x, x[:, :1]):
            with pytest.raises(NonFiniteError, match="overflow"):
                layer(inputs, cache=cache)
        assert cache.used == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("held", [0, 1])
@torch.no_grad()
def test_a_value_that_overflows_is_refused_by_its_own_call(held, kernel):
    """No row of the call has seen the last row's value; the cache would keep it."""
    layer, x = make({"num_heads": 2, "feedback_norm": False}, 3, kernel=kernel)
    layer, x, cache = layer.float(), x.float(), layer.make_cache(2, 5)
    if held:
        layer(x[:, :held], cache=cache)
    layer.Psi_V.weight.fill_(1e38)
    layer.Omega_V.weight.mul_(100.0)
    with pytest.raises(NonFiniteError, match="smaller Psi_V"):
        layer(x[:, held : held + 1], cache=cache)
    assert cache.used == held


@pytest.mark.parametrize("name", ["norm-rope", "only-values", "relative-window"])
def test_derivatives_of_both_orders(name):
    layer, x = make(OPTIONS[name] | {"window": None}, 5, batch=1)
    weights = (layer.Psi_V.weight, layer.W_K.weight)

    def outputs(x, *values):
        return torch.func.functional_call(layer, dict(zip(("Psi_V.weight", "W_K.weight"), values, strict=True)), x)

    assert torch.autograd.gradcheck(outputs, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_equation_is_what_iterating_solves(name):
    layer, x = make(OPTIONS[name], 9)
    exact = found(layer, x)
    layer.solver = Picard(rtol=1e-14, atol=1e-14, max_steps=50)
    close(found(layer, x), exact, 1e-10)


def test_other_gradients():
    """Unrolled, and phantom where its steps reach back to the first row, are exact; fewer steps cut the chain."""
    layer, x = make({}, 6)
    exact = found(layer, x)
    layer.adjoint = Phantom(steps=6, damping=1.0)
    close(found(layer, x), exact, 1e-11)
    layer.adjoint, layer.solver = Unrolled(), Anderson(rtol=1e-13, atol=1e-13, max_steps=100)
    close(found(layer, x), exact, 1e-9)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"is_causal": False, "self_query": "output"}, "values"),
        ({"self_query": "output"}, "values"),
        ({"normalize_over": "keys", "self_query": "output"}, "values"),
        ({"values": "linear", "feedback_norm": False}, "feedback_norm"),
        ({"values": "linear", "query_input": True, "query_output": False}, "query_output"),
        ({"query_output": False}, "query_output"),
        ({"values": "fedback"}, "values"),
    ],
)
def test_refused_in_words(options, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        ImplicitQueryAttention(8, 2, **FEEDBACK | options)


def test_settings_that_need_the_triangle_cannot_be_taken_away():
    layer, x = make({}, 4)
    with pytest.raises(ValueError, match="values"):
        layer.self_query = "output"
    layer.solver = ForwardSubstitution(kernel="triton")
    with pytest.raises((ValueError, ImportError), match="kernel"):
        layer(x)
