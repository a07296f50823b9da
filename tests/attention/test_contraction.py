"""Layers with `max_gain`: their maps contract as promised, for random weights of any size and every option.

`CONTRACTION_LAYERS=10000 pytest tests/attention/test_contraction.py -k random_layers` tries more of them.
"""

import math
import os
import random

import pytest
import torch

from implicit_attention import (
    Anderson,
    CollapseWarning,
    Contraction,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    ImplicitQueryAttention,
    Phantom,
    Picard,
)
from implicit_attention.attention import gain as gains
from implicit_attention.attention.gain import gain, predicted_steps

LAYERS = int(os.environ.get("CONTRACTION_LAYERS", "160"))
GROUPS = 12
ROUNDING = 1e-8  # float64, of a map whose scores are up to 1e7


def choose(draw, *choices):
    return draw.choice(choices)


def random_case(seed, largest=1000.0, rtol=1e-7):
    """A layer with random options and weights, and its inputs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    by_queries, heads = choose(draw, True, True, False), choose(draw, 1, 2, 4)
    options = {
        "normalize_over": "queries" if by_queries else "keys",
        "query_input": choose(draw, True, True, False) if by_queries else True,
        "num_kv_heads": choose(draw, heads, max(1, heads // 2)),
        "qk_norm": choose(draw, False, False, True),
        "positions": choose(draw, None, "rope", "alibi", "relative"),
        "bias": choose(draw, False, True),
        "dropout": choose(draw, 0.0, 0.0, 0.3),
        "max_gain": choose(draw, 0.1, 0.5, 0.9, 0.99),
    }
    if options["num_kv_heads"] == heads:
        options["values"] = choose(draw, "linear", "linear", "identity")
    layer = ImplicitQueryAttention(8, heads, dtype=torch.float64, solver=Contraction(rtol=rtol), **options)
    boost = largest ** draw.uniform(0, 1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if choose(draw, False, False, True) and parameter.dim() == 2:
                parameter.copy_(torch.outer(torch.randn(len(parameter)), torch.randn(parameter.shape[1])) / 8)
            if name == "positions.table":
                parameter.normal_()
            parameter.mul_(boost if choose(draw, True, False) else 1.0)
    batch, rows = 2, draw.randint(1, 7)
    context = torch.randn(batch, draw.randint(1, 7), 8, dtype=torch.float64) if not by_queries else None
    columns = rows if context is None else context.shape[1]
    x = torch.randn(batch, rows, 8, dtype=torch.float64)
    inputs = {"context": context} if context is not None and choose(draw, True, False) else {}
    columns = columns if inputs else rows
    mask = choose(draw, None, None, "bool", "float")
    if mask is not None:
        hidden = torch.rand(rows, columns) < 0.4
        inputs["attn_mask"] = hidden if mask == "bool" else torch.randn(rows, columns, dtype=torch.float64)
    if "context" not in inputs and mask is not None and choose(draw, True, False):
        inputs["segments"] = torch.randint(0, 2, (batch, rows)).cumsum(1)
    if choose(draw, False, False, True):
        hidden = torch.rand(batch, columns) < 0.4
        inputs["key_padding_mask"] = choose(draw, hidden, torch.where(hidden, -math.inf, 0.0).double())
    return layer, x, inputs


def solve(layer, x, inputs, seed):
    torch.manual_seed(seed)  # dropout's
    return layer.solve(x, **inputs)


def lengths(t):
    """The norm in which the map contracts, of each system."""
    return t.norm(dim=-1)


def worst(layer, t):
    return lengths(t).amax(1) if layer.normalize_over == "queries" else lengths(t)


def worst_direction(layer, function, args, at):
    """A direction in which the map stretches much: some rounds of the power method of this norm."""
    direction = torch.randn_like(at)
    for _ in range(3):
        image = torch.func.jvp(lambda y: function(y, *args), (at,), (direction,))[1]
        if layer.normalize_over == "queries":  # the row that moves most pulls on all tokens
            row = lengths(image).argmax(1)[:, None, None]
            image = torch.zeros_like(image).scatter(1, row.expand(-1, 1, 8), image.gather(1, row.expand(-1, 1, 8)))
        pulled = torch.func.vjp(lambda y: function(y, *args), at)[1](image)[0]
        direction = pulled / lengths(pulled)[..., None].clamp_min(1e-300)
    return direction


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_layers_contract_settle_as_predicted_and_agree(group):
    for seed in range(group, LAYERS, GROUPS):
        layer, x, inputs = random_case(seed)
        with torch.no_grad():
            solution = solve(layer, x, inputs, seed)
            torch.manual_seed(seed)
            function, args, start = layer.equation(x, **inputs)
        assert solution.converged.all(), seed
        assert solution.unique
        c = layer.max_gain
        values = dict(zip(function.names, args, strict=True))["value"]
        size = values.abs().max().item() + 1e-300
        # Rounding of F, as large as the scores and the values.
        noise = ROUNDING * size
        at = size * torch.randn_like(start)
        direction = worst_direction(layer, function, args, solution.value)
        for here, move in ((at, size * torch.randn_like(at)), (solution.value, 1e-3 * size * direction)):
            change = function(here + move, *args) - function(here, *args)
            assert (worst(layer, change) <= c * worst(layer, move) * (1 + 1e-6) + noise).all(), seed
        y, first = at, None
        for step in range(predicted_steps(c, 1e-6) + 1):
            image = function(y, *args)
            residual = worst(layer, image - y)
            first = residual if first is None else first
            assert (residual <= c**step * first * (1 + 1e-6) + noise).all(), seed
            if (residual <= 1e-6 * first).all():
                break
            y = image
        else:
            pytest.fail(f"not settled as predicted: {seed}")
        far = 1e-6 * worst(layer, at - solution.value) + first * 1e-6  # |y - y*| <= residual / (1 - c)
        assert (worst(layer, image - solution.value) <= (far + noise) / (1 - c)).all(), seed


@pytest.mark.parametrize("group", range(GROUPS))
def test_gradients_of_random_layers_are_those_of_finite_differences(group):
    for seed in range(group, LAYERS // 5, GROUPS):
        layer, x, inputs = random_case(seed, largest=20.0, rtol=1e-12)
        cotangent = torch.randn_like(x)
        leaves = {"x": x, **dict(layer.named_parameters())}
        value = solve(layer, x.requires_grad_(), inputs, seed).value
        grads = torch.autograd.grad(value, leaves.values(), cotangent, allow_unused=True)
        total = sum(p.norm() for p in layer.parameters()).item()
        some = random.Random(seed).sample([*zip(leaves.items(), grads, strict=True)], 2)
        for (name, leaf), grad in some:
            if grad is None:
                continue
            direction = torch.randn_like(leaf) * leaf.detach().abs().mean()
            found = (grad * direction).sum().item()
            size = value.abs().sum().item()
            apart = []
            for step in (1e-4 / (1 + total), 1e-6 / (1 + total)):  # the shorter one where a maximum or norm has a kink
                expected = slope(layer, x, inputs, seed, cotangent, leaf, step * direction) / step
                apart.append(abs(found - expected) - 1e-4 * abs(expected) - 1e-12 * size / step)
            assert min(apart) <= 0, (seed, name, found, expected)


def slope(layer, x, inputs, seed, cotangent, leaf, move):
    """The central difference of order 4 along a move of a leaf."""
    found = 0.0
    with torch.no_grad():
        for h, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            leaf.add_(h * move)
            found += weight * (solve(layer, x, inputs, seed).value * cotangent).sum().item() / 12
            leaf.sub_(h * move)
    return found


CASES = {
    "queries": {},
    "groups": {"num_kv_heads": 2},
    "rope": {"positions": "rope"},
    "relative": {"positions": "relative", "bias": True},
    "norm": {"qk_norm": True},
    "keys": {"normalize_over": "keys", "num_kv_heads": 2},
    "identity": {"values": "identity"},
    "no-input": {"query_input": False, "positions": "alibi", "bias": True},
}


def make(dtype=torch.float64, seed=0, gain=4.0, **options):
    torch.manual_seed(seed)
    layer = ImplicitQueryAttention(16, 4, **{"query_input": True, "max_gain": 0.9, "dtype": dtype, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(gain)
    return layer


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_solver_agrees_with_iteration_on_the_map(options):
    """Values and gradients, padding and mask, of the two ways that share no code but the kernels."""
    layer, x, cotangent = make(**options), *torch.randn(2, 3, 9, 16, dtype=torch.float64)
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[0, 5:] = True
    mask = torch.randn(9, 9, dtype=torch.float64).requires_grad_()
    leaves = [x.requires_grad_(), mask, *layer.parameters()]
    found = []
    for solver in (Contraction(rtol=1e-13), Anderson(rtol=1e-14, atol=1e-14)):
        layer.solver = solver
        y = layer(x, attn_mask=mask, key_padding_mask=hidden)
        found.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_hidden_tokens_change_nothing_and_contract_too(options):
    layer, x = make(**options), torch.randn(2, 9, 16, dtype=torch.float64)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 6:] = True
    whole = layer.solve(x, key_padding_mask=hidden).value
    torch.testing.assert_close(whole[:, :6], layer.solve(x[:, :6]).value, rtol=1e-8, atol=1e-8)
    wild = torch.cat([x[:, :6], 1e4 * x[:, 6:]], 1)
    found = layer.solve(wild, key_padding_mask=hidden)
    assert found.converged.all()
    torch.testing.assert_close(found.value[:, :6], whole[:, :6], rtol=1e-8, atol=1e-8)


def test_packed_documents_are_bounded_each_for_itself():
    layer, x = make(positions="rope"), torch.randn(1, 12, 16, dtype=torch.float64)
    packed = layer.solve(x, cu_seqlens=torch.tensor([0, 5, 12]))
    assert packed.unique
    for part in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(packed.value[:, part], layer.solve(x[:, part]).value, rtol=1e-8, atol=1e-8)


def test_a_sample_does_not_depend_on_the_others():
    layer, x = make(torch.float32), torch.randn(4, 9, 16)
    x[0] *= 0.01  # settles in fewer steps
    whole = layer.solve(x)
    assert whole.steps.unique().numel() > 1
    for i in range(4):
        torch.testing.assert_close(layer.solve(x[i : i + 1]).value, whole.value[i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reported_residual_is_no_smaller_than_that_of_the_value(dtype):
    layer, x = make(dtype), torch.randn(3, 9, 16, dtype=dtype)
    with torch.no_grad():
        found = layer.solve(x)
        function, args, _ = layer.equation(x)
        own = (function(found.value, *args) - found.value).abs().amax((1, 2))
    assert found.converged.all()
    assert (own <= found.residual + 8 * torch.finfo(dtype).eps * found.value.abs().amax((1, 2))).all()


@pytest.mark.parametrize("group", range(4))
@torch.no_grad()
def test_values_are_nearer_to_the_equilibrium_than_the_tolerance(group):
    """A fifth of it, told by the rate of two steps: half as much again for what that does not see."""
    for seed in range(100 * group, 100 * group + 100):
        layer, x, inputs = random_case(seed)
        y = layer.eval().solve(x, **inputs).value
        layer.solver = Contraction(rtol=5e-2)
        found, size = layer.solve(x, **inputs).value, y.abs().amax((1, 2))
        assert bool(((found - y).abs().amax((1, 2)) <= 1.5 * 0.2 * 5e-2 * size + 1e-6 * size).all()), seed


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(("batch", "length"), [(4, 64), (1, 600)])
def test_the_default_tolerance_gives_what_the_guide_says(batch, length, sharpness):
    """Outputs within 1e-3 of the equilibrium, gradients within the tolerance."""
    found = []
    for dtype, rtol in ((torch.float32, None), (torch.float64, 1e-9)):
        torch.manual_seed(0)
        x, cotangent = torch.randn(2, batch, length, 64).to(dtype).unbind()
        layer = ImplicitQueryAttention.for_encoder(64, 4, positions=None, solver=Contraction(rtol=rtol))
        with torch.no_grad():
            for weight in (layer.Omega_Q.weight, layer.W_K.weight, layer.W_Q.weight):
                weight.mul_(sharpness)
        layer, leaf = layer.to(dtype), x.requires_grad_()
        y = layer(leaf)
        found.append(
            [t.detach().double() for t in (y, *torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent))]
        )
    (y, *grads), (exact_y, *exact) = found
    assert float((y - exact_y).norm() / exact_y.norm()) < 1e-3
    assert max(float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)) < 0.05


def test_the_adjoint_allows_for_rounding():
    """A tolerance below it would call every gradient untrustworthy."""
    torch.manual_seed(0)
    layer = ImplicitQueryAttention.for_encoder(16, 4, solver=Contraction(rtol=1e-12), on_failure="raise")
    layer(torch.randn(2, 30, 16)).sum().backward()


def test_fixed_steps_take_exactly_so_many_and_report_the_residual():
    layer, x = make(torch.float32, solver=Contraction(steps=4), on_failure="ignore"), torch.randn(3, 9, 16)
    found = layer.solve(x.requires_grad_())
    assert found.evaluations == 4
    found.value.sum().backward()
    assert (layer.last_solve.adjoint.steps == 4).all()
    assert layer.last_solve.converged.all()
    assert layer.last_solve.adjoint.converged.all()
    layer.solver = Contraction(steps=2, rtol=1e-6)
    assert not layer.solve(x).converged.any()


def test_no_gate_changes_the_map_below_the_bound():
    layer, x = make(gain=0.1), torch.randn(2, 5, 16, dtype=torch.float64)
    found = layer.solve(x).value
    layer.max_gain, layer.solver = None, Picard(max_steps=500)
    torch.testing.assert_close(found, layer.solve(x).value, rtol=1e-8, atol=1e-8)


def test_second_derivatives_and_other_gradients():
    layer = make(gain=1.0, solver=Contraction(rtol=1e-13, fallback=Anderson(rtol=1e-13, atol=1e-13)))
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), nondet_tol=1e-9, atol=1e-5, fast_mode=True)
    layer.adjoint = Phantom(steps=30, damping=1.0)
    rough = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.adjoint = Implicit()
    torch.testing.assert_close(rough, torch.autograd.grad(layer(x).sum(), x)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_the_bound_of_rotated_keys_is_close_above_the_norm(size):
    weight = torch.randn(2 * size, 40, dtype=torch.float64)
    key = torch.randn(1, 2, 5, size, dtype=torch.float64)
    found = gains._pulled(key, weight, True)
    norms = torch.linalg.matrix_norm(weight.view(2, size, 40), ord=2) ** 2
    exact = key.square().sum(-1) * norms[None, :, None]
    assert (found >= exact * (1 - 1e-12)).all()
    assert (found <= exact * size ** (1 / 64) * (1 + 1e-12)).all()
    assert torch.isfinite(torch.func.grad(lambda w: gains._pulled(key, w, True).sum())(torch.zeros_like(weight))).all()


def test_the_bound_takes_half_types_wide():
    key, value, weight = (torch.randn(*s, dtype=torch.bfloat16) for s in ((1, 2, 5, 4), (1, 2, 5, 4), (8, 8)))
    found = gain(key, value, weight, scale=0.5, rows_are_keys=True)
    assert found.squared.dtype == torch.float32
    wide = gain(key.double(), value.double(), weight.double(), scale=0.5, rows_are_keys=True)
    # What is stored is rounded to a few epsilons of bfloat16: that much is added to the squared radius of each head.
    radius, size = gains._ball(value.double(), 0.0, None, None)
    added = (gains.ROUNDINGS * torch.finfo(torch.bfloat16).eps) ** 2 * size
    assert (found.squared >= wide.squared * (1 - 1e-5)).all()
    assert (found.squared <= wide.squared * (1 + (added / radius).amax() + 1e-5)).all()


@pytest.mark.parametrize("size", [1e-8, 1e-10, 1e-11, 1e-12, 1e-15, 1e-20, 0.0])
def test_gradients_are_finite_where_a_token_is_tiny_and_another_hidden(size):
    layer, x = ImplicitQueryAttention.for_encoder(16, 4), torch.randn(2, 5, 16)
    x[0, 0] = size
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 4] = True
    layer(x, key_padding_mask=hidden).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("garbage", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("by_queries", [True, False])
def test_what_stands_in_the_padding_changes_neither_outputs_nor_the_tolerance(garbage, by_queries):
    layer = ImplicitQueryAttention(
        8, 1, query_input=True, max_gain=0.9, solver=Contraction(rtol=1e-6),
        normalize_over="queries" if by_queries else "keys",
    )  # fmt: skip
    with torch.no_grad():
        layer.Omega_Q.weight *= 100
    x, hidden = torch.randn(1, 3, 8), torch.tensor([[False, False, True]])
    alone = layer.solve(x[:, :2])
    x[:, 2] = garbage
    found = layer.solve(x, key_padding_mask=hidden)
    torch.testing.assert_close(found.value[:, :2], alone.value, rtol=1e-5, atol=1e-6)
    seen = found.steps if by_queries else found.steps[:, :2]  # one number a sample, or one a token
    assert torch.equal(seen, alone.steps)


def test_half_precision_gradients_do_not_overflow_where_those_of_float32_are_small():
    torch.manual_seed(8)
    options = {"qk_norm": True, "num_kv_heads": 2, "positions": "relative"}
    layer, half = (ImplicitQueryAttention.for_encoder(16, 4, **options) for _ in range(2))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(10)
    half.load_state_dict(layer.state_dict())
    half.half()
    x = 5 * torch.randn(2, 6, 16)
    layer(x).square().mean().backward()
    half(x.half()).float().square().mean().backward()
    for (name, parameter), other in zip(layer.named_parameters(), half.parameters(), strict=True):
        error = (other.grad.float() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.05, f"{name}: {error}"  # 40 roundings of half precision


def test_an_adjoint_that_overflows_gives_gradients_that_are_not_finite_and_a_warning():
    torch.manual_seed(0)
    layer = ImplicitQueryAttention.for_encoder(64, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(10)
    with torch.autocast("cpu", torch.float16):
        loss = (layer(torch.randn(4, 16, 64)).float() - 1).square().mean()
    with pytest.warns(ConvergenceWarning, match="the adjoint equation was not solved"):
        (65536.0 * loss).backward()
    assert not layer.Omega_Q.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "others", "size"),
    [(1, None, 1e3), (1, None, 1e6), (5, 1, 1e3), (5, 1, 1e6), (5, None, 1e3), (5, 5, 1e6)],
)
def test_rounding_is_in_the_bound(dtype, tokens, others, size):
    """Tokens without any spread: L would be 0, f 1, and rounding of large values would be amplified."""
    for seed in range(4):
        torch.manual_seed(seed)
        make = ImplicitQueryAttention.for_encoder if others is None else ImplicitQueryAttention.for_cross_attention
        layer = make(16, 4, dtype=dtype, solver=Contraction(rtol=1e-2), on_failure="raise")
        x = (size * torch.randn(1, 1, 16, dtype=dtype)).expand(2, tokens, 16).clone().requires_grad_()
        given = () if others is None else (size * torch.randn(2, others, 16, dtype=dtype),)
        layer(x, *given).square().mean().backward()
        assert x.grad.isfinite().all()


def test_what_keys_share_is_not_amplified():
    for seed in range(8):
        torch.manual_seed(seed)
        layer = ImplicitQueryAttention.for_cross_attention(64, 4, dtype=torch.bfloat16, on_failure="raise")
        shared = 100 * torch.randn(1, 1, 64)
        x = (shared + torch.randn(4, 16, 64)).bfloat16().requires_grad_()
        layer(x, (shared + torch.randn(4, 16, 64)).bfloat16()).sum().backward()
        assert x.grad.abs().max() < 100


@pytest.mark.parametrize("max_gain", [1e-10, 1e-25, 1e-300])
def test_a_tiny_gain_is_one(max_gain):
    layer = ImplicitQueryAttention(8, 2, query_input=True, max_gain=max_gain, on_failure="raise")
    layer(torch.randn(2, 1, 8)).sum().backward()
    assert layer.Omega_Q.weight.grad.isfinite().all()


def test_refusals():
    for bad in (0.0, 1.0, -0.5, 2, float("nan")):
        with pytest.raises(ValueError, match="`max_gain` must be a number in"):
            ImplicitQueryAttention(8, max_gain=bad)
    for bad in (True, "0.9"):
        with pytest.raises(TypeError, match="`max_gain` must be a number in"):
            ImplicitQueryAttention(8, max_gain=bad)
    with pytest.raises(ValueError, match=r"`max_gain` must be None with is_causal=True.*solved exactly"):
        ImplicitQueryAttention(8, max_gain=0.9, is_causal=True)
    with pytest.raises(ValueError, match=r"`max_gain` must be None.*query_input=True"):
        ImplicitQueryAttention(8, max_gain=0.9, normalize_over="keys")
    with pytest.raises(
        ValueError, match=r"`solver` must be another one.*give the layer max_gain=0.9, or take Anderson"
    ):
        ImplicitQueryAttention(8, solver=Contraction())
    with pytest.raises(ValueError, match=r"`steps` must be at least 2"):
        Contraction(steps=1)
    with pytest.raises(TypeError, match=r"`fallback` must be an iterative solver"):
        Contraction(fallback=None)
    layer = ImplicitQueryAttention(8, max_gain=0.9, solver=Contraction())
    layer.max_gain = None
    with pytest.raises(ValueError, match=r"does not contract by a known rate"):
        layer(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match=r"`solver` must be another one with max_gain=None"):
        layer.solver = Contraction(rtol=1e-3)


def test_nan_is_said():
    layer, x = make(torch.float32), torch.randn(2, 5, 16)
    x[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="`x` holds 1 NaN or Inf"):
        layer(x)


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
def test_nan_is_said_by_solvers_that_do_not_look(on_failure):
    layer = ImplicitQueryAttention.for_encoder(16, 4, solver=Contraction(steps=3), on_failure=on_failure)
    x = torch.randn(2, 5, 16)
    x[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="`x` holds 1 NaN or Inf"):
        layer(x)


def test_a_free_layer_that_fails_names_the_remedy():
    layer = make(torch.float32, gain=20.0, max_gain=None, solver=Anderson(max_steps=3), on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"stop contracting as weights grow: a layer with max_gain=0.9"):
        layer(torch.randn(2, 9, 16))


@pytest.mark.parametrize("cross", [False, True])
def test_a_start_saves_steps_and_changes_nothing_else(cross):
    torch.manual_seed(0)
    options = {"normalize_over": "keys"} if cross else {}
    layer = ImplicitQueryAttention(16, 2, query_input=True, max_gain=0.9, out_proj=True, dtype=torch.float64, **options)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    context = (torch.randn(2, 5, 16, dtype=torch.float64),) if cross else ()
    plain = layer.solve(x, *context)
    (wanted,) = torch.autograd.grad(plain.value.square().sum(), x)
    for start in (plain.value, plain.value.detach().float(), 1e6 * torch.randn_like(plain.value)):
        found = layer.solve(x, *context, start=start)
        assert found.converged.all()
        torch.testing.assert_close(found.value, plain.value, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(torch.autograd.grad(found.value.square().sum(), x)[0], wanted, atol=1e-7, rtol=1e-7)
    assert layer.solve(x, *context, start=plain.value).evaluations == 1
    torch.testing.assert_close(layer(x, *context, start=plain.value), layer(x, *context), atol=1e-8, rtol=1e-8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, *context, start=plain.value.detach()), layer(x, *context), atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("by_queries", [False, True], ids=["keys", "queries"])
@torch.no_grad()
def test_a_far_start_does_not_widen_the_tolerance(by_queries):
    """Its image can be larger than the equilibrium by far, and the tolerance is relative to what is returned."""
    options = {"normalize_over": "keys", "query_input": True} if by_queries else {"positions": "rope"}
    for seed in range(100, 150):
        torch.manual_seed(seed)
        layer = ImplicitQueryAttention(2, 1, max_gain=0.9, scale=5.0, **options)
        for weight in layer.parameters():
            weight.mul_(3)
        x, start = torch.randn(2, 64, 2, 2).unbind()
        found = layer.solve(x, start=100 * start)
        size = found.value.abs().amax(2 if by_queries else (1, 2))
        rounding = 8 * torch.finfo(x.dtype).eps * layer.Omega_V(x).abs().amax()
        assert found.converged.all()
        assert (found.residual <= 5e-2 * size + rounding).all(), seed


def test_a_start_may_be_overwritten_before_the_backward_pass():
    torch.manual_seed(0)
    layer, x = ImplicitQueryAttention(16, 2, query_input=True, max_gain=0.9), torch.randn(2, 9, 16)
    buffer, weight = layer.solve(x).value.detach(), layer.W_K.weight
    wanted = torch.autograd.grad(layer(x, start=buffer).sum(), weight)
    y = layer(x, start=buffer)
    buffer.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], wanted[0])


def test_iterative_solvers_begin_where_the_call_says():
    torch.manual_seed(0)
    layer, x = ImplicitQueryAttention(16, 2, query_input=True), torch.randn(9, 16)
    plain = layer.solve(x)
    assert plain.evaluations > 2
    assert layer.solve(x, start=plain.value).evaluations == 1
    assert torch.equal(layer.equation(x, start=plain.value).start[0], plain.value)


def test_a_layer_that_collapses_says_so_from_any_start():
    torch.manual_seed(0)
    layer, x = ImplicitQueryAttention(16, 2), torch.randn(1, 9, 16)
    with pytest.warns(CollapseWarning):
        layer.solve(x, start=layer.Omega_V(x).mean(1, keepdim=True).expand(1, 9, 16))


def test_a_start_that_cannot_be_used_is_refused():
    layer, x = ImplicitQueryAttention(16, 2, query_input=True, max_gain=0.9), torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match=r"`start` must be of shape \(2, 9, 16\)"):
        layer(x, start=x[:1])
    with pytest.raises(TypeError, match="`start` must be a float tensor"):
        layer(x, start=[0.0])
    with pytest.raises(ValueError, match="`start`"):
        layer(x, start=x * float("nan"))
    with pytest.raises(ValueError, match="`start` must be None next to segments"):
        layer(x, start=x, segments=torch.zeros(2, 9, dtype=torch.int64))
    causal = ImplicitQueryAttention(16, 2, is_causal=True)
    with pytest.raises(ValueError, match="`start` must be None with ForwardSubstitution"):
        causal(x, start=x)
    cache = causal.make_cache(2, 10)
    with torch.no_grad():
        causal(x, cache=cache)
        with pytest.raises(ValueError, match="`start` must be None with ForwardSubstitution"):
            causal(x[:, :1], cache=cache, start=x[:, :1])
    assert cache.lengths.tolist() == [9, 9]
