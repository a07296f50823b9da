"""`inspect` against brute force (the whole Jacobian, iteration by hand), and the words for known troubles."""

import json
import math
from itertools import pairwise

import pytest
import torch

import implicit_attention
from implicit_attention import (
    Anderson,
    ForwardSubstitution,
    ImplicitQueryAttention,
    ImplicitQueryAttentionLinearV,
    Picard,
    inspect,
)
from implicit_attention.inspection.spectrum import ritz_values
from tests.bridge import make_layer
from tests.causal.test_row_problems import REPELLING, THREE_ROOTS, X, make

D, N = 8, 6
LAYERS = {
    "causal": {"is_causal": True},
    "causal-qk_norm-rope": {"is_causal": True, "qk_norm": True, "positions": "rope", "query_input": True},
    "causal-input": {"is_causal": True, "self_query": "input"},
    "unmasked": {"query_input": True},
    "contracting": {"query_input": True, "max_gain": 0.9},
    "contracting-qk_norm-rope": {"query_input": True, "max_gain": 0.9, "qk_norm": True, "positions": "rope"},
    "unmasked-relative-groups": {"query_input": True, "positions": "relative", "num_kv_heads": 1},
    "independent": {"normalize_over": "keys", "query_input": True},
}


def tight(options):
    solver = ForwardSubstitution(rtol=1e-14, atol=1e-13) if "is_causal" in options else Anderson(
        rtol=1e-13, atol=1e-13, max_steps=1000
    )  # fmt: skip
    return make_layer(D, 2, gain=2.0, solver=solver, **options), torch.randn(N, D, dtype=torch.float64)


def whole_jacobian(layer, x):
    y = layer.solve(x[None]).value.detach()
    function, args, _ = layer.equation(x)
    jacobian = torch.autograd.functional.jacobian(lambda t: function(t, *args), y)
    return jacobian[0, :, :, 0]  # [N, D, N, D]


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_stability_is_that_of_the_whole_jacobian(options):
    layer, x = tight(options)
    jacobian = whole_jacobian(layer, x)
    (found,) = inspect(layer, x, iterations=200).layers
    values = torch.linalg.eigvals(jacobian.reshape(N * D, N * D))
    own = torch.stack([torch.linalg.eigvals(jacobian[i, :, i]) for i in range(N)])
    assert found.method.startswith("exact")
    assert found.radius == pytest.approx(float(values.abs().max()), abs=1e-6)
    torch.testing.assert_close(found.gain, own.abs().amax(1), atol=1e-6, rtol=0)
    if found.structure == "unmasked":
        fold, leading = (1 - values).abs().min().expand(N), values.abs().max().expand(N)
    else:  # the H = 2 non-zero ones of each token; zeros are 1 away from 1
        fold, leading = torch.minimum((1 - own).abs().amin(1), torch.ones(N)), own.abs().amax(1)
    torch.testing.assert_close(torch.minimum(found.fold, torch.ones(N)).double(), fold.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.leading.abs(), leading, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_traces_and_maps_are_those_of_iteration_by_hand(options):
    layer, x = tight(options)
    report = inspect(layer, x, iterations=200)
    (found,) = report.layers
    function, args, y = (part.detach() if torch.is_tensor(part) else part for part in layer.equation(x))
    iterates = [y]
    for _ in range(len(found.trace)):
        iterates.append(function(iterates[-1], *args).detach())
    change = torch.stack([(b - a)[0].view(N, 2, -1).abs().amax(2).T for a, b in pairwise(iterates)])
    torch.testing.assert_close(found.trace, change, atol=1e-12, rtol=0)
    for t, weights in zip(found.iterations, found.maps, strict=True):
        torch.testing.assert_close(weights, function.weights(iterates[t], *args)[0], atol=1e-12, rtol=0)
    settled = layer.solve(x).value
    torch.testing.assert_close(found.settled_map, function.weights(settled[None], *args)[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(found.at("settled"), found.settled_map)
    residual = (function(settled[None], *args) - settled).abs().amax(2)[0]
    torch.testing.assert_close(found.residual, residual, atol=1e-12, rtol=0)
    assert report.settles
    assert not found.troubles
    assert (found.other_start < 1e-9).all()
    assert found.adjoint_residual < 1e-10


def test_steps_rates_and_periods_of_plain_iteration():
    (found,) = inspect(make(-1.0, -3.0, "auto"), X).layers
    last = int(((found.trace[:, 0, 1] > 1e-14).nonzero()).max())
    slope = float((found.trace[last, 0, 1] / found.trace[last // 2, 0, 1]) ** (1 / (last - last // 2)))
    assert float(found.rate[0, 1]) == pytest.approx(slope, rel=1e-2)
    assert float(found.rate[0, 1]) == pytest.approx(found.radius, rel=5e-2)  # Picard's factor, near the equilibrium
    steps = int((found.trace[:, 0, 1] > found.tolerance[1]).sum())
    assert found.plain_steps.tolist() == [[0, steps]]
    assert found.period.tolist() == [0, 0]
    (found,) = inspect(make(*REPELLING, "auto"), X).layers
    assert found.plain_steps.tolist() == [[0, -1]]
    assert found.period.tolist() == [0, 2]


def fold():
    """One row just before its two upper roots meet: at the fold beta p (1 - p) = 1."""
    p = (1 + math.sqrt(1 - 4 / 6)) / 2
    return make(math.log(p / (1 - p)) - 6 * p + 1e-7, 6.0, "auto")


TROUBLES = {
    "repelling": (lambda: make(*REPELLING, "auto"), X, "cycle", "2-cycle", True),
    "repelling-picard": (lambda: make(*REPELLING, Picard()), X, "unsettled", "2-cycle", False),
    "three-roots": (lambda: make(*THREE_ROOTS, "auto"), X, "several roots", "another equilibrium at token 1", True),
    "fold": (fold, X, "near the fold", "gain is near 1 at token 1", True),
    "unmasked": (lambda: ImplicitQueryAttention(32, 4), None, "collapse", "mean of the values", True),
    "unmasked-seed": (lambda: ImplicitQueryAttentionLinearV(32), None, "collapse", "mean of the values", True),
    "unmasked-qk_norm": (
        lambda: ImplicitQueryAttention(64, 4, qk_norm=True), None, "unsettled", "mostly find no equilibrium", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_the_words_name_the_trouble(name):
    build, x, kind, words, settles = TROUBLES[name]
    layer = build()
    x = torch.randn(64, layer.embed_dim) if x is None else x
    report = inspect(layer, x)
    assert report.layers[0].troubles[0].kind == kind
    assert f"troubles: {kind}" in repr(report.layers[0])
    assert len(repr(report.layers[0])) < 200
    assert words in report.summary
    assert report.settles is settles
    assert ("does not settle" in report.summary) is not settles


def test_many_numbers_are_estimated_and_it_says_so():
    layer = ImplicitQueryAttention(32, 2, query_input=True, dtype=torch.float64)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(4)
    x = torch.randn(17, 32, dtype=torch.float64)
    (found,) = inspect(layer, x).layers
    jacobian = whole_jacobian(layer, x).reshape(544, 544)
    assert found.method.startswith("estimate: Arnoldi")
    assert found.radius == pytest.approx(float(torch.linalg.eigvals(jacobian).abs().max()), rel=1e-4)


def test_ritz_values_of_an_invariant_space_are_exact():
    turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
    matrix = torch.block_diag(turn, torch.zeros(48, 48, dtype=torch.float64))
    matrix[:2, 2:] = torch.randn(2, 48, dtype=torch.float64)
    values, left = ritz_values(lambda v: matrix @ v, torch.randn(50, dtype=torch.float64), 20)
    assert left == 0.0
    assert len(values) < 6
    assert sorted(v.imag for v in values.tolist() if abs(v) > 1) == pytest.approx([-2, 2])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = ImplicitQueryAttention(8, 2, is_causal=True)
        self.old = ImplicitQueryAttentionLinearV(8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, x, mask=None):
        return self.old(self.first(x, key_padding_mask=mask))


def test_layers_within_a_model_are_seen_and_left_as_they_are():
    model, x = Model().train(), torch.randn(1, 5, 8)
    hidden = torch.tensor([[True, False, False, False, False]])
    report = inspect(model, x, mask=hidden)
    assert [layer.name for layer in report.layers] == ["first", "old"]
    assert (report.layers[0].settled_map[:, 1:, 0] == 0).all()  # the mask went along
    alone = inspect(model.first, x, key_padding_mask=hidden).layers[0]
    torch.testing.assert_close(alone.settled_map, report.layers[0].settled_map)
    assert model.training
    assert model.first.training
    assert "solve" not in vars(model.first)
    assert not model.first._forward_pre_hooks
    assert [layer.name for layer in inspect(model, x, layers=["old"]).layers] == ["old"]


def test_frozen_modules_stay_in_eval_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), ImplicitQueryAttention(8, 2, is_causal=True)).train()
    model[0].eval()
    inspect(model, torch.randn(1, 5, 8))
    assert [module.training for module in model] == [False, True]


def test_what_does_not_settle_is_reported_and_not_raised():
    """Also for a layer that raises, and without a trace in the figures of its training."""
    layer = ImplicitQueryAttention(8, 2, query_input=True, solver=Anderson(max_steps=1), on_failure="raise")
    model, x = torch.nn.Sequential(layer), torch.randn(1, 5, 8)
    assert not inspect(model, x).settles
    assert layer.last_solve is None
    with pytest.raises(implicit_attention.ConvergenceError):
        model(x)


def test_inference_mode_is_left_for_the_measurement():
    model = Model()
    with torch.inference_mode():
        x = torch.randn(1, 5, 8)
        found = inspect(model, x, mask=torch.zeros(1, 5, dtype=torch.bool))
    torch.testing.assert_close(found.layers[0].gain, inspect(model, x.clone()).layers[0].gain)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inspect(torch.nn.Linear(2, 2), torch.randn(1, 2)), ValueError, "holds an ImplicitQueryAttention"),
        (lambda: inspect("layer", torch.randn(1, 2)), TypeError, "layer_or_model"),
        (lambda: inspect(Model(), 3), TypeError, "x_or_text"),
        (lambda: inspect(Model(), "text"), ValueError, "Pass tokenizer="),
        (lambda: inspect(Model(), torch.randn(2, 5, 8)), ValueError, r"Inspect x\[:1\]"),
        (lambda: inspect(Model(), torch.randn(1, 5, 8), layers=["third"]), ValueError, "first, old"),
        (lambda: inspect(Model(), torch.randn(1, 5, 8), tokens=["a"]), ValueError, "5 labels, but got 1"),
        (lambda: inspect(Model(), torch.randn(1, 5, 8), tokens=torch.arange(5)), TypeError, "labels that are strings"),
        (lambda: inspect(Model(), torch.randn(1, 5, 8), iterations=0), ValueError, "iterations"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_report_in_other_forms():
    report = inspect(Model(), torch.randn(1, 5, 8), tokens=list("<abcd"))
    assert isinstance(report, implicit_attention.Report)
    assert report.summary in repr(report)
    found = json.loads(report.to_json())
    assert found["tokens"][0] == "<"
    assert "maps" not in found["layers"][0]
    assert found["layers"][0]["gain"] == pytest.approx(report.layers[0].gain.tolist())
    assert len(json.loads(report.to_json(maps=True))["layers"][0]["maps"][0]) == 2
    assert report._repr_html_().count("<tr>") == 3
    assert "collapses" in report._repr_html_()
    with pytest.raises(ValueError, match="iteration"):
        report.layers[0].at(1000)


def test_pandas(monkeypatch):
    report = inspect(Model(), torch.randn(1, 5, 8))
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_pandas()
    monkeypatch.undo()
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = report.to_pandas()
    assert len(table) == 5 * 2 + 5
    assert set(table.layer) == {"first", "old"}
    row = table[(table.layer == "first") & (table["head"] == 1) & (table.position == 3)].iloc[0]
    assert row.rate == pytest.approx(float(report.layers[0].rate[1, 3]), nan_ok=True)


@pytest.mark.parametrize("kind", ["residual", "attention", "gain", "steps"])
def test_figures(kind):
    figure_module = pytest.importorskip("matplotlib.figure")
    report = inspect(Model(), torch.randn(1, 5, 8))
    axes = figure_module.Figure().subplots()
    assert report.figure(kind, layer=1, ax=axes) is axes.figure
    assert axes.get_title().startswith("old")
    assert report.figure(kind, head=1).axes
    with pytest.raises(ValueError, match="head"):
        report.figure(kind, head=2)
    with pytest.raises(ValueError, match="layer"):
        report.figure(kind, layer=2)
    with pytest.raises(ValueError, match="kind"):
        report.figure("map")
