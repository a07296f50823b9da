"""The price of values that read outputs: checked before it is timed."""

import pytest

from benchmarks import feedback, layer
from implicit_attention import ImplicitQueryAttention


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(feedback, "SHAPES", ((2, 40, 16, 2),))


def test_every_layer_is_measured_next_to_an_ordinary_one():
    result = feedback.run(repeats=1)
    (shape,) = result["shapes"]
    assert result["correct"]
    assert list(shape["rows"]) == [layer.ORDINARY, *feedback.LAYERS, feedback.GRU]
    assert all(row["forward_backward"]["time_ratio"] > 0 for row in shape["rows"].values())


def test_a_wrong_output_is_told(monkeypatch):
    solve = ImplicitQueryAttention.solve

    def spoilt(self, x, **options):
        solution = solve(self, x, **options)
        solution.value[0, 5] += 1e-3
        return solution

    monkeypatch.setattr(ImplicitQueryAttention, "solve", spoilt)
    assert not feedback.run(repeats=1)["correct"]
