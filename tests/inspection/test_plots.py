"""The pictures hold what they were given; how they look is for eyes."""

import builtins

import pytest
import torch

from implicit_attention import ImplicitQueryAttention, Picard
from implicit_attention.inspection import plots


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def save(figure, path):
    figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figure


def test_convergence_draws_panels_on_a_log_scale(tmp_path):
    trace = torch.tensor([1.0, 0.1, 0.01, 0.0, 0.0], requires_grad=True)
    figure = plots.convergence({"left": {"a": [3.0, 2.0], "b": trace}, "right": {"c": [1, 0.5]}}, tolerance=1e-3)
    save(figure, tmp_path / "a.png")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("left", "right")
    assert left.get_yscale() == right.get_yscale() == "log"
    assert set(lines(left)) == {"a", "b"}
    assert set(lines(right)) == {"c"}
    assert lines(left)["b"].get_ydata() == pytest.approx([1.0, 0.1, 0.01]), "zeros have no logarithm"
    assert "then 0" in {text.get_text() for text in left.texts}
    assert (figure.get_size_inches() * figure.dpi)[0] >= 1200


def test_convergence_takes_curves_without_panels(tmp_path):
    (axes,) = save(plots.convergence({"a": [1.0, 0.5], "b": [2.0, 0.1]}), tmp_path / "a.png").axes
    assert set(lines(axes)) == {"a", "b"}
    save(plots.convergence({"stays zero": [0.0, 0.0]}), tmp_path / "b.png")
    with pytest.raises(ValueError, match="`traces` must be at least one curve"):
        plots.convergence({})


def test_convergence_takes_traces_as_solutions_have_them():
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True, solver=Picard(max_steps=100)), torch.randn(3, 9, 8)
    solution = layer.solve(x)
    worst = solution.abs_trace.flatten(1).amax(1)
    (axes,) = plots.convergence({"Picard": solution.abs_trace, "whole": solution}).axes
    for name in ("Picard", "whole"):
        assert lines(axes)[name].get_ydata() == pytest.approx(worst[worst > 0].tolist())
    (axes,) = plots.convergence({"panel": {"whole": solution}}).axes
    assert len(lines(axes)["whole"].get_ydata()) == (worst > 0).sum()


def test_convergence_says_zero_only_of_what_ends_at_zero():
    nan = float("nan")
    traces = {"zero at first": [0.0, 1.0, 0.5], "diverges": [1.0, 9.0, nan], "to zero": [1.0, 0.0], "lost": [nan, nan]}
    (axes,) = plots.convergence(traces).axes
    assert [text.get_text() for text in axes.texts] == ["then 0"]
    assert axes.texts[0].xy == (0, 1.0)
    assert set(lines(axes)) == {"zero at first", "diverges", "to zero", "lost: nothing above 0"}


def test_convergence_of_a_direct_solver_is_refused_and_not_drawn_empty():
    solution = ImplicitQueryAttention(8, 2, is_causal=True).solve(torch.randn(3, 9, 8))
    with pytest.raises(ValueError, match=r"`traces\['causal'\]` must be a figure for each.*got 1.*Picard\(\)"):
        plots.convergence({"causal": solution.abs_trace})
    with pytest.raises(ValueError, match=r"`traces\['causal'\]` must be a figure for each.*got 1.*Picard\(\)"):
        plots.convergence({"causal": solution})
    with pytest.raises(ValueError, match="got 0"):
        plots.convergence({"panel": {"none": []}})
    (axes,) = plots.convergence({"stays zero": [0.0, 0.0]}).axes
    assert set(lines(axes)) == {"stays zero: always 0"}


def test_recall_labels_each_curve_with_its_last_accuracy(tmp_path):
    figure = plots.recall({"one": {20: 0.1, 40: 0.995}, "other": {20: 0.1, 40: 0.2}}, guess=0.125)
    (axes,) = save(figure, tmp_path / "a.png").axes
    assert set(lines(axes)) == {"one", "other", "guessing"}
    assert {text.get_text() for text in axes.texts} == {"99.5 %", "20.0 %"}
    with pytest.raises(ValueError, match="none for 'empty'"):
        plots.recall({"empty": {}})


@pytest.mark.parametrize(("shape", "count", "panels"), [((5, 5), 4, 4), ((3, 5, 4), 1, 3), ((2, 5, 4), 3, 6)])
def test_attention_draws_every_head_on_one_scale(tmp_path, shape, count, panels):
    maps = {f"iteration {i}": torch.rand(shape) for i in range(count)}
    square = shape[-1] == shape[-2]
    figure = save(plots.attention(maps, tokens=list("abcde") if square else None), tmp_path / "a.png")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list("abcde") or not square
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == panels
    assert len({image.get_clim() for image in images}) == 1


SOLUTION = ImplicitQueryAttention(8, 2, is_causal=True, solver=Picard()).solve(torch.randn(1, 4, 8))
W = torch.rand(5, 5)
REFUSED = {
    "convergence-solution": (
        lambda: plots.convergence(SOLUTION),
        *(TypeError, "`traces` must be a mapping", "got Solution", '{"Picard": solution}'),
    ),
    "convergence-list": (lambda: plots.convergence([1.0, 0.5]), TypeError, "`traces` must be a mapping", "[1.0, 0.5]"),
    "convergence-none": (lambda: plots.convergence({"a": None}), TypeError, "`traces['a']` must be a Sol", "got None"),
    "convergence-text": (lambda: plots.convergence({"a": "ab"}), TypeError, "`traces['a']` must be a Sol", "'ab'"),
    "convergence-deep": (
        lambda: plots.convergence({"a": {"b": {"c": [1.0]}}}),
        *(TypeError, "`traces['a']['b']` must be a Solution", "(dict)"),
    ),
    "convergence-empty": (lambda: plots.convergence({}), ValueError, "`traces` must be at least one", "got none."),
    "convergence-empty-panel": (
        lambda: plots.convergence({"a": {}}),
        *(ValueError, "`traces['a']` must be at least one curve", "got none."),
    ),
    "convergence-zero": (
        lambda: plots.convergence({"a": [1.0, 0.5]}, tolerance=0),
        *(ValueError, "`tolerance` must be a number > 0", "got 0"),
    ),
    "convergence-text-tolerance": (
        lambda: plots.convergence({"a": [1.0, 0.5]}, tolerance="x"),
        *(TypeError, "`tolerance` must be a number > 0", "'x'"),
    ),
    "recall-list": (lambda: plots.recall([0.5]), TypeError, "`curves` must be a mapping with a name", "[0.5]"),
    "recall-nothing": (lambda: plots.recall({}), ValueError, "`curves` must be at least one curve", "got none."),
    "recall-no-steps": (
        lambda: plots.recall({"a": [0.5]}),
        *(TypeError, "`curves['a']` must be a mapping with an accuracy for each training step", "[0.5]", "{100: 0.5}"),
    ),
    "recall-empty": (lambda: plots.recall({"a": {}}), ValueError, "`curves` must be an accuracy", "got none for 'a'."),
    "recall-text-step": (
        lambda: plots.recall({"a": {"1": 0.5}}),
        *(TypeError, "`curves['a']` must be a mapping with", "got the step '1' (str)", "int(step)"),
    ),
    "recall-per-cent": (
        lambda: plots.recall({"a": {1: 50.0}}),
        *(ValueError, "`curves['a'][1]` must be a number in [0, 1]", "got 50.0"),
    ),
    "recall-guess": (
        lambda: plots.recall({"a": {1: 0.5}}, guess="x"),
        *(TypeError, "`guess` must be a number in [0, 1]", "'x'"),
    ),
    "learning-list": (lambda: plots.learning([0.5]), TypeError, "`curves` must be a mapping with a name", "[0.5]"),
    "learning-no-steps": (
        lambda: plots.learning({"a": [0.5]}),
        *(TypeError, "`curves['a']` must be a mapping with a loss for each training step", "[0.5]"),
    ),
    "learning-nothing": (lambda: plots.learning({}), ValueError, "`curves` must be at least one curve", "got none."),
    "learning-empty": (lambda: plots.learning({"a": {}}), ValueError, "must be a loss for at least one", "got none."),
    "learning-text-step": (
        lambda: plots.learning({"a": {"1": 0.5}}),
        *(TypeError, "`curves['a']` must be a mapping with a loss", "got the step '1' (str)"),
    ),
    "learning-text": (lambda: plots.learning({"a": {1: "x"}}), TypeError, "`curves['a'][1]` must be a number", "'x'"),
    "attention-tensor": (
        lambda: plots.attention(W),
        *(TypeError, "`maps` must be a mapping", "(5, 5)", '{"attention": weights}'),
    ),
    "attention-none": (
        lambda: plots.attention({"a": None}),
        *(TypeError, "`maps['a']` must be a tensor of shape", "got None", "need_weights=True"),
    ),
    "attention-array": (lambda: plots.attention({"a": W.numpy()}), TypeError, "`maps['a']` must be a", "ndarray"),
    "attention-vector": (lambda: plots.attention({"a": W[0]}), ValueError, "`maps['a']` must be of shape", "(5,)"),
    "attention-batch": (
        lambda: plots.attention({"a": W[None, None]}),
        *(ValueError, "`maps['a']` must be of shape", "(1, 1, 5, 5)", "weights[0]"),
    ),
    "attention-no-rows": (lambda: plots.attention({"a": W[:0]}), ValueError, "`maps['a']` must be", "one at least"),
    "attention-no-heads": (lambda: plots.attention({"a": W[None][:0]}), ValueError, "`maps['a']` must be", "(0, 5, 5)"),
    "attention-complex": (lambda: plots.attention({"a": W + 1j}), ValueError, "`maps['a']` must be", "real numbers"),
    "attention-no-maps": (
        lambda: plots.attention({}),
        *(ValueError, "`maps` must be at least one attention matrix", "got none."),
    ),
    "tokens-few": (
        lambda: plots.attention({"a": W}, tokens=["a"]),
        *(ValueError, "`tokens` must be 5 labels", "got 1."),
    ),
    "tokens-of-one-map": (
        lambda: plots.attention({"a": W, "b": W[:4, :4]}, tokens=list("abcde")),
        *(ValueError, "`tokens` must be 4 labels", "got 5."),
    ),
    "tokens-tensor": (
        lambda: plots.attention({"a": W}, tokens=torch.arange(5)),
        *(TypeError, "`tokens` must be labels that are strings", "torch.int64", ".tolist()"),
    ),
    "tokens-number": (lambda: plots.attention({"a": W}, tokens=5), TypeError, "`tokens` must be labels", "got 5 (int)"),
    "tokens-not-square": (
        lambda: plots.attention({"a": W[:, :4]}, tokens=list("abcd")),
        *(ValueError, "`tokens` must be None for maps that are not square", "[5, 4]"),
    ),
    "heat-list": (lambda: plots.heat([[1.0]], "", "", ""), TypeError, "`values` must be a tensor", "[R, C]", "[[1.0]]"),
    "heat-vector": (lambda: plots.heat(W[0], "", "", ""), ValueError, "`values` must be of shape [R, C]", "(5,)"),
    "heat-colours": (lambda: plots.heat(torch.rand(4, 4, 3), "", "", ""), ValueError, "`values` must be", "(4, 4, 3)"),
    "heat-axes": (lambda: plots.heat(W, "", "", "", ax=[1]), TypeError, "`ax` must be matplotlib's Axes", "axes[0]"),
    "by_token-list": (lambda: plots.by_token([1.0], "", ""), TypeError, "`values` must be a tensor of shape [N]"),
    "by_token-matrix": (lambda: plots.by_token(W, "", ""), ValueError, "`values` must be of shape [N]", "(5, 5)"),
    "by_token-nothing": (lambda: plots.by_token(W[0][:0], "", ""), ValueError, "`values` must be", "one at least"),
    "by_token-axes": (lambda: plots.by_token(W[0], "", "", ax=3), TypeError, "`ax` must be", "got 3 (int)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "parts"), [(c, e, p) for c, e, *p in REFUSED.values()], ids=REFUSED)
def test_what_cannot_be_drawn_is_refused(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'implicit-attention\[plot\]'"):
        plots.recall({"a": {1: 0.5}})


def test_learning_draws_each_curve_and_scales_to_what_comes_late():
    curves = {"training": {s: 8.0 / s for s in range(1, 101)}, "held out": {50: 0.3, 100: 0.2}}
    (axes,) = plots.learning(curves).axes
    assert [line.get_label() for line in axes.lines] == list(curves)
    assert list(axes.lines[1].get_ydata()) == [0.3, 0.2]
    low, high = axes.get_ylim()
    assert low < 0.08
    assert 0.8 < high < 1.0, "the first tenth may lie above the picture"
    with pytest.raises(ValueError, match="at least one step"):
        plots.learning({"training": {}})


def test_learning_takes_losses_that_are_tensors_or_not_finite():
    losses = {1: torch.tensor(2.0, requires_grad=True), 2: 1.0, 3: float("nan"), 4: float("inf")}
    (axes,) = plots.learning({"training": losses}).axes
    assert list(axes.lines[0].get_ydata())[:2] == [2.0, 1.0]
    assert axes.get_ylim() == pytest.approx((0.98, 2.1))
    plots.learning({"training": {1: float("nan")}, "zero": {1: 0.0}})
