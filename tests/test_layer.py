"""`ImplicitQueryAttention` against the NumPy oracle: the map, the equilibrium, the weights, all gradients."""

import copy

import numpy as np
import pytest
import torch

from implicit_attention import (
    Anderson,
    Contraction,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Picard,
    RelativeBias,
    Rotary,
    Unrolled,
)
from implicit_attention.attention import spec as spec_module
from tests import oracle
from tests.bridge import array, close, make_layer, oracle_gradients, problem_of
from tests.test_bad_input import refused

# Residuals are solved to 1e-13 and gradients to 1e-13 of their size; both are amplified by 1 / (1 - contraction)
# < 100 for these weights, and float64 adds 1e-15 per rounding.
TOL = 1e-10

OPTIONS = {
    "seed": {},
    "heads": {"num_heads": 2},
    "bias-scale": {"num_heads": 2, "bias": True, "scale": 0.3},
    "bias-one_head": {"bias": True},
    "query_input": {"num_heads": 2, "query_input": True, "bias": True},
    "identity": {"num_heads": 4, "values": "identity"},
    "qk_norm": {"num_heads": 2, "qk_norm": True},
    "qk_norm-rope": {"num_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True},
    "rope-one_head": {"positions": "rope"},
    "alibi": {"num_heads": 2, "positions": "alibi"},
    "relative": {"num_heads": 2, "positions": "relative"},
    "causal": {"is_causal": True},
    "causal-heads-qk_norm": {"is_causal": True, "num_heads": 2, "qk_norm": True},
    "causal-alibi": {"is_causal": True, "num_heads": 2, "positions": "alibi"},
    "causal-input": {"is_causal": True, "num_heads": 2, "self_query": "input"},
    "causal-input-relative": {"is_causal": True, "self_query": "input", "positions": "relative", "num_heads": 2},
    "causal-input-qk_norm-rope": {
        "is_causal": True,
        "self_query": "input",
        "qk_norm": True,
        "positions": "rope",
        "query_input": True,
    },
    "keys": {"normalize_over": "keys", "num_heads": 2},
    "keys-query_input-rope": {
        "normalize_over": "keys",
        "query_input": True,
        "positions": "rope",
        "num_heads": 2,
        "bias": True,
    },
    "keys-causal-relative": {"normalize_over": "keys", "is_causal": True, "positions": "relative", "num_heads": 2},
    "keys-qk_norm-identity": {"normalize_over": "keys", "qk_norm": True, "values": "identity", "num_heads": 2},
}
MASKS = ["none", "bool", "float", "per-head", "padding", "float-padding", "both"]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_mask = pytest.mark.parametrize("kind", MASKS)


def make_masks(kind, B, N, M, H):
    """Masks for a call; boolean ones hide a whole row."""
    hidden = torch.rand(N, M) < 0.3
    hidden[N // 2] = True
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[:1, -(M // 3) :] = M >= 3
    masks = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(N, M, dtype=torch.float64)},
        "per-head": {"attn_mask": torch.rand(B * H, N, M) < 0.3},
        "padding": {"key_padding_mask": padding},
        "float-padding": {"key_padding_mask": torch.randn(B, M, dtype=torch.float64)},
        "both": {"attn_mask": hidden.expand(B, H, N, M), "key_padding_mask": padding},
    }
    return masks[kind]


def make_inputs(options, B, N, M=None, D=8, kind="none"):
    layer = make_layer(D, **{"gain": 0.5} | options)
    x = torch.randn(B, N, D, dtype=torch.float64)
    context = None if M is None else torch.randn(B, M, D, dtype=torch.float64)
    masks = make_masks(kind, B, N, N if M is None else M, layer.num_heads)
    return layer, x, context, masks


def check_map(layer, x, context, masks):
    """F and the attention weights at a state far from the equilibrium."""
    equation, problem = layer.equation(x, context, **masks), problem_of(layer, x, context, **masks)
    y = torch.randn_like(x)
    close(equation.start, oracle.initial_guess(problem), 1e-13)
    close(equation.function(y, *equation.args), oracle.apply(problem, array(y)), 1e-12)
    weights = equation.function.weights(y, *equation.args)
    close(weights, oracle.attention_weights(problem, array(y)), 1e-12)


def check_equilibrium(layer, x, context, masks):
    problem = problem_of(layer, x, context, **masks)
    y, weights = layer(x, context, need_weights=True, average_attn_weights=False, **masks)
    close(y, oracle.solve(problem, start=array(y)), TOL)
    close(weights, oracle.attention_weights(problem, array(y)), TOL)
    assert torch.equal(layer.solve(x, context, **masks).value, y)


def check_gradients(layer, x, context, masks):
    x.requires_grad_()
    inputs = {"x": x}
    if context is not None:
        inputs["context"] = context.requires_grad_()
    y = layer(x, context, **masks)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    problem = problem_of(layer, x, context, **masks)
    expected = oracle_gradients(layer, problem, oracle.solve(problem, start=array(y)), array(grad_y))
    for name, tensor in (inputs | dict(layer.named_parameters())).items():
        found = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad  # x may give the start only
        close(found, expected[name], TOL)


@pytest.mark.parametrize("N", [1, 7, 63, 64, 65], ids=lambda n: f"N{n}")
@every_option
def test_map(options, N):
    check_map(*make_inputs(options, 2, N))


@every_mask
@every_option
def test_masked_map(options, kind):
    check_map(*make_inputs(options, 3, 7, kind=kind))


@pytest.mark.parametrize(("B", "N"), [(2, 1), (2, 7), (1, 17)], ids=["B2-N1", "B2-N7", "B1-N17"])
@every_option
def test_equilibrium(options, B, N):
    check_equilibrium(*make_inputs(options, B, N))


@every_mask
@pytest.mark.parametrize(
    "case", ["heads", "qk_norm-rope", "causal-heads-qk_norm", "causal-input", "keys-causal-relative"]
)
def test_masked_equilibrium(case, kind):
    check_equilibrium(*make_inputs(OPTIONS[case], 2, 7, kind=kind))


@every_option
def test_gradients(options):
    check_gradients(*make_inputs(options, 2, 4))


@every_mask
@pytest.mark.parametrize("case", ["relative", "causal-heads-qk_norm", "causal-input-relative", "keys-query_input-rope"])
def test_masked_gradients(case, kind):
    check_gradients(*make_inputs(OPTIONS[case], 2, 4, kind=kind))


@pytest.mark.parametrize(("N", "D"), [(1, 2), (65, 2)], ids=["N1-D2", "N65-D2"])
@pytest.mark.parametrize("case", ["seed", "causal", "causal-input-qk_norm-rope", "keys-causal-relative"])
def test_gradients_at_the_edges(case, N, D):
    check_gradients(*make_inputs(OPTIONS[case] | {"num_heads": 1}, 1, N, D=D))


@every_mask
@pytest.mark.parametrize("M", [1, 3, 9], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("case", [c for c in OPTIONS if c.startswith("keys") and "causal" not in c])
def test_cross_attention(case, M, kind):
    if kind == "none":
        check_gradients(*make_inputs(OPTIONS[case], 2, 4, M))
    inputs = make_inputs(OPTIONS[case], 2, 5, M, kind=kind)
    check_map(*inputs)
    check_equilibrium(*inputs)


@pytest.mark.parametrize("kind", ["none", "bool", "padding"])
@pytest.mark.parametrize("case", ["heads", "causal-heads-qk_norm", "causal-input-relative", "keys-causal-relative"])
def test_row_chunks_do_not_matter(case, kind, monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 50_000)  # 41 rows of 300 columns, 2 heads, 2 samples
    inputs = make_inputs(OPTIONS[case], 2, 301, kind=kind)
    assert len(inputs[0].equation(inputs[1]).function.spec.chunks(*[torch.empty(2, 2, 301, 4)] * 2)) > 5
    check_map(*inputs)


@pytest.mark.parametrize("case", ["relative", "causal-input-relative", "keys-query_input-rope"])
def test_row_chunks_do_not_matter_to_gradients(case, monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(spec_module, "MIN_CHUNK", 2)
    check_gradients(*make_inputs(OPTIONS[case], 2, 5, kind="both"))


@pytest.mark.parametrize("case", ["heads", "relative", "causal", "causal-input", "qk_norm-rope", "keys"])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(case):
    layer, x, _, masks = make_inputs(OPTIONS[case], 2, 7, kind="bool")
    x.requires_grad_()
    y, weights = layer(x, need_weights=True, **masks)
    assert torch.equal(y[:, 3], torch.zeros_like(y[:, 3]))
    assert torch.equal(weights[:, 3], torch.zeros_like(weights[:, 3]))
    y.square().sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (x, *layer.parameters()))


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("number", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "self_query": "input"},
        {"is_causal": True},
        {"is_causal": True, "self_query": "input", "values": "feedback"},
        {"query_input": True, "max_gain": 0.9},
        {"query_input": True, "normalize_over": "keys"},
    ],
    ids=["input", "output", "feedback", "contracting", "keys"],
)
def test_large_negative_numbers_hide_as_minus_infinity_does(options, number, kernel):
    """Also in rows that see nothing else: beside such numbers a log-sum-exp in float32 has no digits left."""
    torch.manual_seed(0)
    solver = ForwardSubstitution(kernel=kernel) if "is_causal" in options else "auto"
    layer, x = ImplicitQueryAttention(16, 2, solver=solver, qk_norm=True, **options), torch.randn(2, 8, 16)
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[0, :4] = True
    numbers = torch.zeros(2, 8).masked_fill(hidden, number)
    for name, shape in (("key_padding_mask", (2, 8)), ("attn_mask", (2, 2, 8, 8))):
        found = []
        for mask in (hidden, numbers):
            layer.zero_grad()
            y = layer(x, **{name: mask.view(2, *[1] * (len(shape) - 2), 8).expand(shape)})
            y.square().sum().backward()
            found.append([y, *(p.grad for p in layer.parameters())])
        for expected, same in zip(*found, strict=True):
            torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)


def test_all_columns_hidden():
    layer, x, _, _ = make_inputs(OPTIONS["heads"], 2, 5)
    y = layer(x.requires_grad_(), key_padding_mask=torch.tensor([[True] * 5, [False] * 5]))
    y.square().sum().backward()
    assert bool((y[0] == 0).all())
    assert bool((y[1] != 0).all())
    assert bool((x.grad[0] == 0).all())
    assert bool(x.grad.isfinite().all())


@every_option
def test_unbatched_is_a_batch_of_one(options):
    layer, x, _, _ = make_inputs(options, 1, 6)
    padding = torch.tensor([False] * 5 + [True])
    y, weights = layer(x[0], key_padding_mask=padding, need_weights=True)
    batched = layer(x, key_padding_mask=padding[None], need_weights=True)
    assert torch.equal(y, batched[0][0])
    assert torch.equal(weights, batched[1][0])
    solution, whole = layer.solve(x[0], history=True), layer.solve(x, history=True)
    for name in ("value", "residual", "steps", "converged"):
        assert torch.equal(getattr(solution, name), getattr(whole, name)[0]), name
    assert torch.equal(solution.abs_trace, whole.abs_trace[:, 0])
    assert all(torch.equal(a, b[0]) for a, b in zip(solution.history, whole.history, strict=True))


@every_option
def test_empty_batch(options):
    layer, x, _, _ = make_inputs(options, 0, 5)
    y, weights = layer(x.requires_grad_(), need_weights=True)
    assert y.shape == (0, 5, 8)
    assert weights.shape == (0, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert bool(layer.solve(x).converged.all())


def test_a_sample_does_not_depend_on_its_batch():
    layer, x, _, _ = make_inputs({"num_heads": 2}, 4, 9)
    close(layer(x)[2:3], array(layer(x[2:3])), 1e-13)


def test_out_proj_follows_the_equilibrium():
    layer, x, _, _ = make_inputs({"num_heads": 2, "out_proj": True, "bias": True}, 2, 5)
    assert torch.equal(layer(x), layer.out_proj(layer.solve(x).value))


def test_eval_mode_keeps_gradients_and_no_grad_drops_them():
    layer, x, _, _ = make_inputs({}, 1, 4)
    layer.eval()
    layer(x).sum().backward()
    assert layer.Omega_Q.weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("options", [OPTIONS["qk_norm-rope"], OPTIONS["relative"]], ids=["qk_norm-rope", "relative"])
def test_copies_and_state_dicts(options):
    layer, x, _, _ = make_inputs(options, 1, 4)
    twin = make_layer(8, seed=1, **options)
    assert str(twin.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    for other in (twin, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
    assert {"Omega_Q.weight", "W_K.weight"} <= set(layer.state_dict())


@every_option
def test_half_precision_stays_near_the_truth(options):
    """bfloat16 keeps 8 bits and solves to 3e-2: weights, map and equilibrium each move by about that much."""
    options = {**options, "solver": "auto", "on_failure": "ignore"}
    layer, x, _, _ = make_inputs(options, 2, 9)
    expected = array(layer(x))
    layer32 = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer32(x.float())
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16().requires_grad_())
    half.float().square().sum().backward()
    close(layer32(x.float()), expected, 1e-4)
    for found in (autocast, half):
        assert found.dtype == torch.bfloat16
        close(found, expected, 0.1)


def test_exposed_settings():
    layer = ImplicitQueryAttention(8, 2, is_causal=True, positions=Rotary(4), qk_norm=True)
    assert (layer.embed_dim, layer.num_heads, layer.head_dim, layer.is_causal) == (8, 2, 4, True)
    assert layer.on_failure == "warn"
    shown = repr(layer)
    assert all(part in shown for part in ("8, num_heads=2", "is_causal=True", "qk_norm=True", "Rotary"))
    assert "solver=ForwardSubstitution(), adjoint=Implicit()" in shown
    fallback = NewtonKrylov(max_steps=3)
    layer.solver = ForwardSubstitution(rtol=1e-3, fallback=fallback)
    assert "solver=ForwardSubstitution(rtol=0.001, fallback=NewtonKrylov(max_steps=3))," in repr(layer)


def test_relative_bias_is_clipped_at_its_reach():
    layer, x, _, _ = make_inputs({"num_heads": 2, "positions": RelativeBias(2, max_distance=3)}, 1, 9)
    layer.double()
    with torch.no_grad():
        layer.positions.table.normal_()
    check_map(layer, x, None, {})
    check_gradients(layer, x, None, {})
    assert np.abs(array(layer.positions.table.grad)).min() > 0


@pytest.mark.parametrize("batched", [True, False])
def test_the_solution_of_a_call(batched):
    layer, x, _, _ = make_inputs({"is_causal": True, "out_proj": True}, 2, 7)
    x = x if batched else x[0]
    expected = layer.solve(x, gains=True)
    y, weights, solution = layer(x, need_weights=True, need_solution=True, gains=True)
    for name in ("value", "residual", "steps", "converged", "gain"):
        assert torch.equal(getattr(solution, name), getattr(expected, name)), name
    right, averaged = layer(x, need_weights=True)
    assert torch.equal(y, right)
    assert torch.equal(weights, averaged)
    y, weights, solution = layer(x, need_solution=True)
    assert torch.equal(y, layer.out_proj(solution.value))
    assert weights is None
    assert solution.gain is None
    with pytest.raises(ValueError, match="`gains` must be False without need_solution=True"):
        layer(x, gains=True)


def test_a_gradient_is_set_by_its_name():
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(1, 3, 8)
    layer.adjoint = "unrolled"
    assert (layer.adjoint, layer.solver) == (Unrolled(), Anderson())
    layer(x).sum().backward()
    with refused(ValueError, "adjoint", '"implicit", "unrolled"', "'exact'"):
        layer.adjoint = "exact"
    with refused(TypeError, "adjoint", "object such as Implicit()", "got 3"):
        layer.adjoint = 3
    assert layer.adjoint == Unrolled()


def test_a_solver_that_auto_chose_follows_the_settings():
    layer, x = ImplicitQueryAttention(8, 2), torch.randn(1, 3, 8)
    assert layer.solver == Anderson()
    layer.is_causal = True
    assert layer.solver == ForwardSubstitution()
    layer.adjoint = Unrolled()
    assert layer.solver == Anderson()
    layer.adjoint, layer.is_causal, layer.max_gain = Implicit(), False, 0.5
    assert layer.solver == Contraction()
    layer(x)
    layer.max_gain = None
    assert copy.deepcopy(layer).solver == Anderson()
    layer.solver = Picard()
    layer.is_causal = True
    assert layer.solver == Picard()
    layer.solver = "auto"
    assert layer.solver == ForwardSubstitution()
    with refused(TypeError, "solver", "solver object", "got 3"):
        layer.solver = 3
