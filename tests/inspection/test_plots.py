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
    trace = layer.solve(x).abs_trace
    (axes,) = plots.convergence({"Picard": trace}).axes
    worst = trace.flatten(1).amax(1)
    assert lines(axes)["Picard"].get_ydata() == pytest.approx(worst[worst > 0].tolist())


def test_convergence_of_a_direct_solver_is_refused_and_not_drawn_empty():
    solution = ImplicitQueryAttention(8, 2, is_causal=True).solve(torch.randn(3, 9, 8))
    with pytest.raises(ValueError, match=r"`traces\['causal'\]` must be a figure for each.*got 1.*Picard\(\)"):
        plots.convergence({"causal": solution.abs_trace})
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
    figure = save(plots.attention(maps, tokens=list("abcde")[: shape[-1]]), tmp_path / "a.png")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == panels
    assert len({image.get_clim() for image in images}) == 1


def test_attention_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"`maps\['a'\]` must be of shape"):
        plots.attention({"a": torch.rand(5)})
    with pytest.raises(ValueError, match="at least one attention matrix"):
        plots.attention({})


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
