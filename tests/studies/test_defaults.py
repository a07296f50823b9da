"""Models come with what the results recommend, or with a reason why not, which the results must bear out."""

from pathlib import Path

import torch

from implicit_attention import ForwardSubstitution, recommended
from implicit_attention.hf import ImplicitAttentionConfig
from studies import choices, records

RECORDS = Path(__file__).parent.parent.parent / "docs" / "data" / "eval"


def recommendations():
    found = records.load(RECORDS)
    return {choice.option: choices.recommended(choice, found) for choice in choices.CHOICES}


def test_defaults_are_those_that_the_results_recommend():
    config = ImplicitAttentionConfig()
    assert config.is_causal
    assert config.solver == "auto"
    tolerance, _ = ForwardSubstitution().tolerances(torch.float32)
    defaults = {
        "qk_norm": str(config.qk_norm),
        "positions": f'"{config.positions}"',
        "adjoint": f'"{config.adjoint}"',
        "tolerance": f"{tolerance:g}",
    }
    expected = recommendations()
    assert set(expected) - set(defaults) == {"self_query"}
    assert defaults == {option: expected[option] for option in defaults}


def test_where_the_default_is_another_the_results_say_what_that_costs():
    """`recommended` says why "input" is the default, and in how many comparisons the original equation is ahead."""
    assert ImplicitAttentionConfig().self_query == recommended.CAUSAL_LM["self_query"] == "input"
    assert recommendations()["self_query"] == '"output"'
    choice = next(choice for choice in choices.CHOICES if choice.option == "self_query")
    found = records.load(RECORDS)
    tally = choices.compared(choice, found)
    compared = [table for table in choice.tables if set(choice.rows.values()) <= found.get(table, {}).keys()]
    (ahead, behind), tables = tally['"output"'], len(compared)
    assert behind == 0
    assert f"ahead in {ahead} of {tables} comparisons" in " ".join(recommended.__doc__.split())
