"""Equal to `nn.MultiheadAttention` where it has to be; and dropout, one mask for a whole solve."""

import itertools

import pytest
import torch
from torch import nn

from implicit_attention import Anderson, ImplicitQueryAttention, Unrolled
from implicit_attention.attention import spec as spec_module
from tests.bridge import TIGHT, array, close, make_layer

# Both compute the same sums in another order: float64 rounding only.
TOL = 1e-12


def make_pair(D, H, **options):
    """An ordinary layer, and an implicit one with the same weights and Omega_Q = 0."""
    ordinary = nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
    nn.init.normal_(ordinary.in_proj_bias)
    nn.init.normal_(ordinary.out_proj.bias)
    layer = ImplicitQueryAttention(
        D, H, normalize_over="keys", query_input=True, bias=True, out_proj=True, dtype=torch.float64, **options
    )
    nn.init.zeros_(layer.Omega_Q.weight)
    with torch.no_grad():
        for i, linear in enumerate((layer.W_Q, layer.W_K, layer.Omega_V)):
            linear.weight.copy_(ordinary.in_proj_weight[i * D : (i + 1) * D])
            linear.bias.copy_(ordinary.in_proj_bias[i * D : (i + 1) * D])
        layer.out_proj.load_state_dict(ordinary.out_proj.state_dict())
    return ordinary, layer


def make_masks(kind, B, H, N, M):
    late = torch.ones(N, M, dtype=torch.bool).triu(1)
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[-1, 1:] = M > 2
    hidden = torch.rand(B * H, N, M) < 0.4
    hidden[..., 0] = False
    return {
        "none": {},
        "causal": {"attn_mask": late},
        "float": {"attn_mask": torch.randn(N, M, dtype=torch.float64)},
        "per-head": {"attn_mask": hidden},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": late, "key_padding_mask": padding},
        "float-both": {
            "attn_mask": torch.randn(B * H, N, M, dtype=torch.float64),
            "key_padding_mask": torch.randn(B, M, dtype=torch.float64),
        },
    }[kind]


@pytest.mark.parametrize("average", [True, False], ids=["average", "per-head"])
@pytest.mark.parametrize("kind", ["none", "causal", "float", "per-head", "padding", "both", "float-both"])
@pytest.mark.parametrize(("B", "N", "H", "D"), [(1, 1, 1, 4), (2, 7, 2, 8), (2, 65, 4, 16)], ids=str)
def test_equals_multihead_attention(B, N, H, D, kind, average):
    ordinary, layer = make_pair(D, H)
    x, masks = torch.randn(B, N, D, dtype=torch.float64), make_masks(kind, B, H, N, N)
    expected = ordinary(x, x, x, need_weights=True, average_attn_weights=average, **masks)
    found = layer(x, need_weights=True, average_attn_weights=average, **masks)
    for a, b in zip(found, expected, strict=True):
        close(a, array(b), TOL)
    assert bool((layer.solve(x, **masks).steps <= 2).all())  # constant in y: one step, and one to see it


def test_causal_option_equals_a_causal_mask():
    ordinary, layer = make_pair(8, 2, is_causal=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    late = torch.ones(9, 9, dtype=torch.bool).triu(1)
    close(layer(x), array(ordinary(x, x, x, attn_mask=late)[0]), TOL)


@pytest.mark.parametrize("M", [1, 5, 12], ids=lambda m: f"M{m}")
def test_cross_attention_equals_multihead_attention(M):
    ordinary, layer = make_pair(8, 2)
    x, context = (torch.randn(2, n, 8, dtype=torch.float64) for n in (7, M))
    masks = make_masks("both", 2, 2, 7, M) if M > 2 else {}
    if masks:
        masks["attn_mask"] = masks["attn_mask"] & (torch.arange(M) > 0)
    expected = ordinary(x, context, context, **masks)
    for a, b in zip(layer(x, context, need_weights=True, **masks), expected, strict=True):
        close(a, array(b), TOL)
    close(layer(x[0], context[0]), array(ordinary(x[0], context[0], context[0])[0]), TOL)


def test_gradients_equal_multihead_attention():
    ordinary, layer = make_pair(8, 2)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(2, 6, 8, dtype=torch.float64)
    expected = torch.autograd.grad(ordinary(x, x, x)[0], [x, *ordinary.parameters()], grad_y)
    linears = (layer.W_Q, layer.W_K, layer.Omega_V)
    wanted = [x, *(t.weight for t in linears), *(t.bias for t in linears), *layer.out_proj.parameters()]
    found = torch.autograd.grad(layer(x), wanted, grad_y)
    joined = (found[0], torch.cat(found[1:4]), torch.cat(found[4:7]), *found[7:])
    for a, b in zip(joined, expected, strict=True):
        close(a, array(b), TOL)


def make_dropped(dropout=0.4, **options):
    return make_layer(8, 2, gain=0.3, dropout=dropout, **options)


def test_one_dropout_mask_for_a_whole_solve():
    layer = make_dropped()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    equation = layer.equation(x)
    y = torch.randn_like(x)
    assert torch.equal(equation.function(y, *equation.args), equation.function(y, *equation.args))
    solution = layer.solve(x)
    assert bool(solution.converged.all())  # a mask redrawn in each step would keep the residual up
    assert not torch.allclose(layer.solve(x).value, solution.value)  # and each solve draws its own


def test_no_dropout_in_evaluation():
    layer = make_dropped().eval()
    plain = make_layer(8, 2, gain=0.3)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))


def test_dropout_keeps_the_expectation():
    """The mean over 20000 masks is within five standard errors of the map without dropout."""
    layer, count = make_dropped(), 20_000
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    y = torch.randn_like(x)
    with torch.no_grad():
        equation = layer.equation(x.expand(count, -1, -1))
        samples = equation.function(y.expand(count, -1, -1), *equation.args)
        still = layer.eval().equation(x)
        error = (samples.mean(0) - still.function(y, *still.args)[0]).abs()
    assert bool((error < 5 * samples.std(0) / count**0.5).all())


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"normalize_over": "keys"}], ids=["seed", "causal", "keys"]
)
def test_dropout_does_not_depend_on_chunks(options, monkeypatch):
    layer = make_dropped(**options)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    equation = layer.equation(x)
    whole = equation.function(x, *equation.args)
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(spec_module, "MIN_CHUNK", 7)
    close(equation.function(x, *equation.args), array(whole), 1e-13)


def test_dropout_masks_are_fair_and_independent():
    spec = spec_module.AttentionSpec(1.0, dropout=0.3)
    seeds, like = torch.randint(2**62, (4,)), torch.zeros((), dtype=torch.float64)
    keep = spec.keep(seeds, 3, slice(0, 128), slice(0, 128), like)
    assert set(keep.unique().tolist()) == {0.0, 1 / 0.7}
    kept = (keep > 0).double()
    # 4 * 3 masks of 128^2 bits: means within five standard deviations, and so are pairwise agreements.
    flat = kept.reshape(12, -1)
    deviation = 5 * (0.3 * 0.7 / 128**2) ** 0.5
    assert bool(((flat.mean(1) - 0.7).abs() < deviation).all())
    assert bool(((kept.mean(-1) - 0.7).abs() < 5 * (0.3 * 0.7 / 128) ** 0.5).all())
    for a, b in itertools.combinations(flat - 0.7, 2):
        assert abs(float((a * b).mean())) < 5 * 0.3 * 0.7 / 128
    first, last = slice(0, 5), slice(100, 128)
    assert torch.equal(spec.keep(seeds[1:2], 3, last, first, like), keep[1:2, :, last, first])


@pytest.mark.parametrize("adjoint", ["implicit", Unrolled()], ids=["implicit", "unrolled"])
def test_gradients_use_the_same_dropout_mask(adjoint):
    layer = make_dropped(0.3, adjoint=adjoint)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(5)  # the seeds of the masks, and so the masks, for every difference alike
        return layer(x)

    assert torch.autograd.gradcheck(call, (x,))


def test_dropout_leaves_the_weights_whole():
    layer = make_dropped()
    weights = layer(torch.randn(2, 5, 8, dtype=torch.float64), need_weights=True)[1]
    close(weights.sum(-1), array(torch.ones(2, 5)), 1e-13)


def test_auto_solver_is_anderson():
    assert ImplicitQueryAttention(8).solver == Anderson() != TIGHT
