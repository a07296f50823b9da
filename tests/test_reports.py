"""What a layer says of its solves: which layer, which call, what to do, how often; and what it keeps of the last."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from implicit_attention import (
    Anderson,
    Broyden,
    CollapseWarning,
    ConvergenceError,
    ConvergenceWarning,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    diagonal,
    fixed_point,
)
from implicit_attention.equilibrium.reports import FailureReport
from tests.bridge import make_layer

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))


def failing(gain=1.0, **options):
    layer = ImplicitQueryAttention(8, 2, is_causal=True, **{"solver": Picard(max_steps=1)} | options)
    with torch.no_grad():
        layer.Omega_Q.weight *= gain
    return layer


def said(call, times=1):
    """The convergence warnings of some calls, with the number of the call that each came in."""
    found = []
    for i in range(1, times + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found += [(i, str(w.message)) for w in caught if issubclass(w.category, ConvergenceWarning)]
    return found


# How often


def test_a_warning_comes_again_with_counts():
    layer = failing()
    found = said(lambda: layer(X), 120)
    assert [i for i, _ in found] == [1, 10, 100]
    first, tenth, hundredth = (text for _, text in found)
    assert "in call 1: the equilibrium was not solved" in first
    assert "Said again at the 10th" in first
    assert "in call 10: " in tenth
    assert "10 failures of this kind so far. Said again at the 100th." in tenth
    assert "100 failures of this kind so far" in hundredth


def test_calls_are_counted_whether_or_not_they_fail():
    layer = failing()
    layer.solver = Picard(max_steps=200)
    for _ in range(4):
        layer(X)
    layer.solver = Picard(max_steps=1)
    ((_, text),) = said(lambda: layer(X))
    assert "in call 5: " in text


def test_raise_raises_every_time_and_ignore_says_nothing():
    layer = failing(on_failure="raise")
    for _ in range(3):
        with pytest.raises(ConvergenceError, match="equilibrium was not solved"):
            layer(X)
    quiet = failing(on_failure="ignore")
    assert said(lambda: quiet(X), 3) == []
    assert not bool(quiet.last_solve.converged.all())


def test_as_an_error_it_leaves_the_counts_right():
    layer = failing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConvergenceWarning, match="in call 1: "):
            layer(X)
        for _ in range(8):
            layer(X)
        with pytest.raises(ConvergenceWarning, match="10 failures"):
            layer(X)


def test_threads_share_a_count():
    layer, texts = failing(), []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: texts.append(str(message))
        threads = [threading.Thread(target=lambda: [layer(X) for _ in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(texts) == 3  # of 100 failures the 1st, the 10th and the 100th
    assert sum("100 failures" in text for text in texts) == 1


# Which layer


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = failing(**options)

    def forward(self, x):
        return x + self.attention(x)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(Block(**options) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_of_a_model_is_named_by_its_path():
    model = Model()
    texts = [text for _, text in said(lambda: model(X))]
    for i, text in enumerate(texts):
        assert text.startswith(f"layers.{i}.attention (ImplicitQueryAttention(8, num_heads=2)) in call 1: ")
    assert len(texts) == 3


def test_the_backward_pass_knows_the_path_too():
    model = Model(adjoint=Implicit(Picard(max_steps=1)), solver=Picard(max_steps=200))
    y = model(X.requires_grad_(False))
    texts = [text for _, text in said(lambda: y.sum().backward())]
    assert sorted(text.split(" ")[0] for text in texts) == [f"layers.{i}.attention" for i in range(3)]
    assert all("the adjoint equation was not solved" in text for text in texts)


def test_a_layer_alone_is_described():
    layer = failing()
    ((_, text),) = said(lambda: layer(X))
    assert text.startswith("ImplicitQueryAttention(8, num_heads=2) in call 1: ")


def test_copies_speak_for_themselves():
    model = Model()
    said(lambda: model(X))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        texts = [text for _, text in said(lambda other=other: nn.Sequential(nn.Identity(), other)(X))]
        assert [text.split(" ")[0] for text in texts] == [f"1.layers.{i}.attention" for i in range(3)]


def test_a_compiled_model_names_its_layers(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(diagonal, "MOST_SWEEPS", 1)
    model, x = Model(solver=ForwardSubstitution(rtol=1e-30, atol=1e-30, kernel="torch")), torch.randn(4, 60, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    texts = [text for _, text in said(lambda: compiled(x))]
    assert [text.split(" ")[0] for text in texts] == [f"layers.{i}.attention" for i in range(3)]
    assert model.layers[0].attention.last_solve.residual.shape == (4, 60)


def test_a_call_of_fixed_point_has_no_layer():
    ((_, text),) = said(lambda: fixed_point(lambda y: -2 * y + 1, torch.zeros(1, 1), solver=Picard(max_steps=2)))
    assert text.startswith("fixed_point: the equilibrium was not solved")
    assert "again" not in text


# What to do


@pytest.mark.parametrize(
    ("solver", "wanted", "absent"),
    [
        (Picard(max_steps=1), ["max_steps (it is 1)", "Picard(damping=0.5)", "NewtonKrylov()"], ["cycles"]),
        (Picard(max_steps=1, damping=0.5), ["Picard(damping=0.25)"], ["damping=0.5"]),
        (Anderson(max_steps=1), ["max_steps (it is 1)", "NewtonKrylov()"], ["damping"]),
        (Broyden(max_steps=1), ["max_steps (it is 1)", "NewtonKrylov()"], ["damping"]),
        (NewtonKrylov(max_steps=1, rtol=1e-30, atol=1e-30), ["max_steps (it is 1)", "cycles (it is 4)"],
         ["use Newton"]),
        (ForwardSubstitution(rtol=1e-30, atol=1e-30, kernel="torch"),
         ["ForwardSubstitution(rtol=..., atol=...)", "qk_norm"], ["max_steps", "NewtonKrylov"]),
    ],
    ids=str,
)  # fmt: skip
def test_advice_exists_for_the_solver(solver, wanted, absent):
    ((_, text),) = said(lambda: failing(gain=20.0, solver=solver)(X))
    assert all(part in text for part in wanted)
    assert not [part for part in absent if part in text]


# The last solve


@pytest.mark.parametrize("options", [
    {"is_causal": True}, {"is_causal": True, "solver": Picard()}, {"is_causal": True, "adjoint": Unrolled()},
    {"is_causal": True, "adjoint": Phantom()}, {"query_input": True}, {"normalize_over": "keys", "query_input": True},
], ids=str)  # fmt: skip
def test_the_last_solve_is_kept_with_its_adjoint(options):
    layer = ImplicitQueryAttention(8, 2, **options)
    assert layer.last_solve is None
    x = X.clone().requires_grad_()
    y = layer(x)
    found, expected = layer.last_solve, layer.solve(x)
    for name in ("residual", "steps", "converged"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert not getattr(found, name).requires_grad
    assert found.evaluations == expected.evaluations
    assert found.adjoint is None
    y.sum().backward()
    assert (layer.last_solve.adjoint is not None) == isinstance(layer.adjoint, Implicit)
    if isinstance(layer.adjoint, Implicit):
        assert bool(layer.last_solve.adjoint.converged.all())
    assert repr(layer.last_solve).count("\n") == 0


def test_a_decoded_token_is_a_solve_too():
    layer = ImplicitQueryAttention(8, 2, is_causal=True)
    cache = layer.make_cache(2, 8)
    with torch.no_grad():
        layer(X[:, :5], cache=cache)
        assert layer.last_solve.steps.shape == (2, 5)
        layer(X[:, 5:], cache=cache)
    assert layer.last_solve.steps.shape == (2, 1)
    assert layer._report.calls == 2


def test_the_last_solve_is_no_state_and_no_leak():
    layer = ImplicitQueryAttention(8, 2, is_causal=True)
    y = layer(X.clone().requires_grad_())
    value = weakref.ref(y)
    y.sum().backward()
    del y
    gc.collect()
    assert value() is None
    assert not [name for name in layer.state_dict() if "solve" in name or "report" in name]
    torch.save(layer.state_dict(), io.BytesIO())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.last_solve is None
        assert torch.equal(other(X), layer(X))
        assert other.last_solve is not None
    layer = weakref.ref(layer)
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=str)
def test_transforms_leave_nothing_of_theirs(adjoint):
    layer = ImplicitQueryAttention(8, 2, query_input=True, adjoint=adjoint)
    torch.func.grad(lambda x: layer(x).sum())(X)
    if isinstance(adjoint, Implicit):
        torch.func.vmap(layer)(X)
    assert layer.last_solve is None or bool(torch.isfinite(layer.last_solve.residual + 0).all())


def test_a_report_of_another_process_has_the_mode_it_was_made_with():
    for mode in ("warn", "raise", "ignore"):
        handle = FailureReport(mode).handle
        assert FailureReport.of(handle).on_failure == mode


def test_a_solution_is_printed_in_one_line():
    layer = ImplicitQueryAttention(8, 2, is_causal=True)
    shown = repr(layer.solve(X))
    assert shown.startswith("Solution(float32[2, 6, 8], 12 of 12 converged, at most ")
    assert "\n" not in shown
    assert "nothing to solve" in repr(layer.solve(X[:0]))


# Histories


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom()], ids=str)
def test_a_direct_solver_refuses_to_give_a_history(adjoint):
    layer = ImplicitQueryAttention(8, 2, is_causal=True, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"`history` must be False with solver=ForwardSubstitution.*Picard\(\)"):
        layer.solve(X, history=True)
    assert layer.solve(X).abs_trace.shape == (1, 2, 6)
    layer.solver = Picard(max_steps=200)
    solution = layer.solve(X, history=True)
    assert len(solution.history) == len(solution.abs_trace) > 2


# Masks that hide everything


def hides(layer, x, **inputs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x, **inputs)
    return [str(w.message) for w in caught if w.category is UserWarning]


KEEPS = {  # what is meant to be kept, by somebody who takes True for that
    "padding": {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
    "mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
    "by-sample": {"attn_mask": torch.ones(4, 5, 5, dtype=torch.bool)},
    "float": {"attn_mask": torch.full((5, 5), -1e9)},
}


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"query_input": True, "max_gain": 0.9}], ids=["causal", "free"]
)
@pytest.mark.parametrize("given", KEEPS.values(), ids=KEEPS)
def test_a_mask_that_hides_everything_is_reported_once(given, options):
    layer, x = ImplicitQueryAttention(16, 2, **options), torch.randn(2, 5, 16)
    (text,) = hides(layer, x, **given)
    (name,) = given
    assert f"`{name}` hides every token" in text
    assert ("~attn_mask" in text or "~key_padding_mask" in text) == (next(iter(given.values())).dtype == torch.bool)
    assert hides(layer, x, **given) == []


def test_a_causal_mask_of_what_to_keep_is_reported():
    """In a causal layer it hides all that a row could see; without a causal mask a row sees what comes later."""
    keep, x = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, torch.randn(2, 5, 16)
    assert len(hides(ImplicitQueryAttention(16, 2, is_causal=True), x, **keep)) == 1
    assert hides(ImplicitQueryAttention(16, 2, query_input=True, max_gain=0.9), x, **keep) == []


def test_masks_that_leave_something_are_not_reported():
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[1, 3] = False  # one sample may be all padding
    layer, x = ImplicitQueryAttention(16, 2, is_causal=True), torch.randn(2, 5, 16)
    assert hides(layer, x, key_padding_mask=padding) == []
    hidden = torch.ones(2, 5, dtype=torch.bool)  # a piece of a prompt that is padded on the left
    assert hides(layer, x, key_padding_mask=hidden, cache=layer.make_cache(2, 8)) == []


# Collapse


COLLAPSING = {
    "default": {},
    "one-head": {"num_heads": 1},
    "values": {"values": "identity"},
    "unrolled": {"adjoint": Unrolled(), "solver": Picard(max_steps=30)},
    "keys": {"normalize_over": "keys"},
    "bfloat16": {"dtype": torch.bfloat16},
}


def collapses(layer, x, **inputs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x, **inputs)
    return [str(w.message) for w in caught if w.category is CollapseWarning]


@pytest.mark.parametrize("options", COLLAPSING.values(), ids=COLLAPSING)
def test_a_collapsed_layer_says_so_once(options):
    layer = ImplicitQueryAttention(16, **{"num_heads": 4} | options)
    x = torch.randn(2, 40, 16).to(layer.W_K.weight.dtype)
    (text,) = collapses(layer, x)
    assert "query_input=True" in text
    assert text.startswith("ImplicitQueryAttention(16, num_heads=")
    assert collapses(layer, x) == []
    assert len(collapses(copy.deepcopy(layer), x)) == 1
    (text,) = collapses(nn.Sequential(nn.Identity(), copy.deepcopy(layer)), x)
    assert text.startswith("1 (")


def test_what_it_says_is_so():
    layer, x = ImplicitQueryAttention(16, 4), torch.randn(2, 40, 16)
    (text,) = collapses(layer, x)
    assert "Omega_Q and W_K get no gradient" in text
    layer(x).square().sum().backward()
    assert float(layer.Omega_Q.weight.grad.abs().max()) < 1e-6 < float(layer.Omega_V.weight.grad.abs().max())


def test_padding_does_not_hide_a_collapse():
    layer, x = ImplicitQueryAttention(16, 4), torch.randn(2, 40, 16)
    hidden = torch.zeros(2, 40, dtype=torch.bool)
    hidden[:, 1:] = True
    assert collapses(layer, x, key_padding_mask=hidden) == [], "one token that all see: their outputs are rightly equal"
    hidden[:, :30] = False
    assert len(collapses(layer, x, key_padding_mask=hidden)) == 1


SOUND = {
    "query_input": {"query_input": True},
    "causal": {"is_causal": True},
    "rope": {"positions": "rope"},
    "relative": {"positions": "relative"},
}


@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND)
def test_layers_at_work_say_nothing(options):
    assert collapses(ImplicitQueryAttention(16, 4, **options), torch.randn(2, 40, 16)) == []


def test_equal_outputs_that_are_right_say_nothing():
    layer = ImplicitQueryAttention(16, 4)
    assert collapses(layer, torch.randn(3, 1, 16)) == [], "one token"
    assert collapses(layer, torch.randn(3, 1, 16).expand(3, 7, 16)) == [], "equal inputs"
    assert collapses(layer, torch.zeros(3, 7, 16)) == []
    assert collapses(layer, torch.zeros(0, 7, 16)) == []
    assert collapses(layer, torch.randn(3, 7, 16), attn_mask=torch.eye(7, dtype=torch.bool)) == []
    strong = make_layer(8, 2, gain=30.0, dtype=torch.float32, on_failure="ignore")
    assert collapses(strong, torch.randn(2, 9, 8)) == [], "scores so large that outputs differ"


def test_a_compiled_layer_says_so_too():
    torch._dynamo.reset()
    layer = torch.compile(ImplicitQueryAttention(16, 4), backend="aot_eager")
    assert len(collapses(layer, torch.randn(2, 40, 16))) == 1


def test_near_singular_rows_are_counted(monkeypatch):
    report = FailureReport()
    report.belong_to(owner := nn.Identity())
    found = said(lambda: report.near_singular(1, 2), 10)
    assert [i for i, _ in found] == [1, 10]
    assert "gradient is not to be trusted: 1 of 2 rows" in found[1][1]
    del owner


def test_failures_in_compiled_code_are_counted(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(diagonal, "MOST_SWEEPS", 1)
    layer = failing(gain=20.0, solver=ForwardSubstitution(rtol=1e-30, atol=1e-30, kernel="torch"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert [i for i, _ in said(lambda: compiled(X), 11)] == [1, 10]
