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
        "adjoint": f'"{config.adjoint}"',
        "tolerance": f"{tolerance:g}",
    }
    expected = recommendations()
    assert set(expected) - set(defaults) == {"self_query", "positions"}
    assert defaults == {option: expected[option] for option in defaults}


def test_where_the_default_is_another_the_results_say_what_that_costs():
    """`recommended` says why "input" is the default, and in how many comparisons the original equation is ahead."""
    assert ImplicitAttentionConfig().self_query == recommended.CAUSAL_LM["self_query"] == "input"
    assert recommendations()["self_query"] == '"output"'
    assert said("self_query", ['"output"', '"input"'])


def test_relative_biases_are_ahead_of_the_default_and_the_reason_is_said():
    assert ImplicitAttentionConfig().positions == recommended.CAUSAL_LM["positions"] == "rope"
    assert recommendations()["positions"] == '"relative"'
    assert said("positions", ['"relative"', '"rope"'])


def said(option, values):
    """Whether `recommended` says in how many comparisons the first value is ahead of the second, and behind in none."""
    choice = next(choice for choice in choices.CHOICES if choice.option == option)
    pair = choices.Choice(option, choice.tables, {value: choice.rows[value] for value in values})
    found = records.load(RECORDS)
    compared = [table for table in pair.tables if set(pair.rows.values()) <= found.get(table, {}).keys()]
    ahead, behind = choices.compared(pair, found)[values[0]]
    assert behind == 0
    return f"ahead in {ahead} of {len(compared)} comparisons" in " ".join(
        recommended.__doc__.replace("ahead of it in", "ahead in").split()
    )
