import json

import pytest
import torch

from benchmarks import contraction, page
from implicit_attention import ImplicitQueryAttention


@pytest.fixture
def small(monkeypatch):
    settings = {
        "tokens": contraction.Setting("tokens", (9,), 16, 2, layers=1, gradients=True),
        "warm": contraction.Setting("in turn", (5,), 16, 2, sharpness=(1.0,), layers=1, inputs=3),
    }
    monkeypatch.setattr(contraction, "SETTINGS", settings)
    return settings


def test_it_measures_errors_and_radii(small):
    result = contraction.run()
    assert result["correct"]
    tokens, warm = result["settings"].values()
    assert (tokens["outputs"]["count"], tokens["gradients"]["count"], tokens["radius"]["count"]) == (4, 2, 4)
    assert (warm["outputs"]["count"], warm["gradients"]) == (6, False)
    for setting in (tokens, warm):
        assert 0 < setting["outputs"]["median"] <= setting["outputs"]["largest"] < 5e-2
        assert 0 < setting["radius"]["median"] < contraction.MAX_GAIN
    json.dumps(result)


def test_errors_are_those_of_the_outputs(small, monkeypatch):
    """A layer whose outputs are a tenth too large is a tenth off."""
    solve = ImplicitQueryAttention.solve

    def spoilt(self, x, **inputs):
        solution = solve(self, x, **inputs)
        if x.dtype == torch.float32:
            solution.value.mul_(1.1)
        return solution

    monkeypatch.setattr(ImplicitQueryAttention, "solve", spoilt)
    result = contraction.measured(contraction.Setting("tokens", (9,), 16, 2, sharpness=(1.0,), layers=1))
    assert result["outputs"]["median"] == pytest.approx(0.1, rel=0.02)


def test_the_guide_says_what_was_measured():
    """ "Mostly below 0.03", with four heads and 16 tokens or more."""
    settings = page.load()["contraction"]["settings"]
    for name in ("tokens", "warm"):
        assert settings[name]["num_heads"] == 4
        assert min(settings[name]["lengths"]) >= 16
        assert settings[name]["radius"]["ninth_decile"] < 0.03
