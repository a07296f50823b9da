"""The cost of a whole layer: checked before it is timed, and shown in the README as it was measured."""

import runpy
from pathlib import Path

import pytest

from benchmarks import layer, readme
from implicit_attention import ImplicitQueryAttention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """One small shape, and only the layers that need no compiler."""
    monkeypatch.setattr(layer, "SHAPES", ((2, 130, 16, 2),))
    quick = {name: options for name, options in layer.LAYERS.items() if "solver" not in options}
    monkeypatch.setattr(layer, "LAYERS", quick)
    return quick


def test_a_layer_is_measured_next_to_an_ordinary_one(small):
    result = layer.run(repeats=1)
    (shape,) = result["shapes"]
    assert result["correct"]
    assert list(shape["rows"]) == [layer.ORDINARY, *small]
    for row in shape["rows"].values():
        assert row["forward"]["time_ratio"] > 0
        assert len(row["forward_backward"]["seconds"]) == 1
    assert shape["rows"][layer.ORDINARY]["forward"]["time_ratio"] == 1


def test_both_layers_have_as_many_weights():
    ordinary, *ours = (sum(p.numel() for p in module.parameters()) for module in layer.made(16, 2).values())
    assert set(ours) == {ordinary}


@pytest.mark.usefixtures("small")
def test_a_wrong_output_is_told(monkeypatch):
    solve = ImplicitQueryAttention.solve

    def spoilt(self, x, **options):
        solution = solve(self, x, **options)
        solution.value[0, 5] += 1e-3
        return solution

    monkeypatch.setattr(ImplicitQueryAttention, "solve", spoilt)
    result = layer.run(repeats=1)
    assert not result["correct"]
    assert result["verdict"].startswith("WRONG")
    assert readme.cost_table(result) == "Not measured yet."


def test_the_table_has_the_figures_that_were_measured():
    rows = {
        name: {"forward": {"time_ratio": 2.5 + i}, "forward_backward": {"time_ratio": 1.25 + i}}
        for i, name in enumerate(layer.LAYERS)
    }
    shape = {"length": 100, "batch": 2, "embed_dim": 16, "num_heads": 2, "rows": rows}
    result = {"correct": True, "processor": "P", "threads": 1, "versions": {"torch": "T"}, "dtype": "float32",
              "rtol": 1e-5, "shapes": [shape], "commit": "0123456789"}  # fmt: skip
    head, _, line, _, machine, made = readme.cost_table(result).splitlines()
    cells = [f"{1.25 + i:.2f} ({2.5 + i:.2f})" for i in range(len(layer.LAYERS))]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == cells
    assert all(readme.title(name) in head for name in layer.LAYERS)
    assert machine == "P, 1 thread, PyTorch T, float32, tolerance 1e-05. `python -m benchmarks layer`."
    assert made == "Made by commit 0123456."
    other = result | {"processor": "Q", "shapes": [shape, shape | {"length": 101}, shape | {"length": 512}]}
    made = readme.cost_table(result, other).splitlines()[-1]
    assert made == 'Made by commit 0123456. On Q "output" takes 1.25 (2.50) at 100, 1.25 (2.50) at 512 tokens.'
    assert "names no commit" in readme.cost_table(result | {"commit": None})


def test_the_picture_of_the_map_is_drawn():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_map.py"))["draw"]()
    assert len(drawn.axes) == 2
