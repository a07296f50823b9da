"""Models come with what the results recommend."""

from pathlib import Path

import torch

from implicit_attention import ForwardSubstitution
from implicit_attention.hf import ImplicitAttentionConfig
from studies import choices, records

RECORDS = Path(__file__).parent.parent.parent / "docs" / "data" / "eval"


def test_defaults_are_those_that_the_results_recommend():
    config = ImplicitAttentionConfig()
    assert config.is_causal
    assert config.solver == "auto"
    tolerance, _ = ForwardSubstitution().tolerances(torch.float32)
    defaults = {
        "self_query": f'"{config.self_query}"',
        "qk_norm": str(config.qk_norm),
        "positions": f'"{config.positions}"',
        "adjoint": f'"{config.adjoint}"',
        "tolerance": f"{tolerance:g}",
    }
    found = records.load(RECORDS)
    recommended = {choice.option: choices.recommended(choice, found) for choice in choices.CHOICES}
    assert defaults == recommended
