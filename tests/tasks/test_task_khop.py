"""k-hop induction, against hops made one by one with Python's own string search."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import KHop
from implicit_attention.tasks.task import IGNORED
from tests.tasks.by_hand import (
    answers,
    check_randomness,
    check_refusals,
    check_shapes,
    constant,
    generator,
    perfect,
)


def end_of(text: str, place: int, k: int) -> str:
    for _ in range(k):
        found = text.rfind(text[place], 0, place)
        if found < 0:
            return "none"
        place = found + 1
    return text[place]


def check_batch(task, batch):
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        k, symbols = tokens[0] - task.symbols + 1, tokens[1:]
        assert 1 <= k <= task.hops
        assert all(0 <= a < task.symbols for a in symbols)
        assert all(a != b for a, b in pairwise(symbols)), "never twice in a row"
        text = "".join(map(chr, symbols))
        ends = [end_of(text, i, k) for i in range(len(text))]
        assert targets == [IGNORED, *(task.symbols if end == "none" else ord(end) for end in ends)]


def test_an_example():
    r"""Symbols a b c a b d b c; from the last c: its c before is followed by a, that a's a by b, and no b before it."""
    task = KHop(length=9, hops=3)
    symbols = torch.tensor([[0, 1, 2, 0, 1, 3, 1, 2]]).expand(3, -1)
    places = task._destinations(symbols, torch.tensor([[1], [2], [3]]))
    assert places[:, -1].tolist() == [4, 2, 0]


@pytest.mark.parametrize("length", [48, 100])
def test_sizes_of_the_comparison(length):
    task = KHop(length)
    batch = task.batch(64, generator())
    check_shapes(task, batch, 64, length)
    check_batch(task, batch)
    assert set(batch.inputs[:, 0].tolist()) == set(range(4, 12)), "every k comes"
    held_out = task.held_out(16, seed=0)
    assert list(held_out) == [f"hops={k}" for k in range(1, 9)]
    for k, kind in enumerate(held_out.values(), start=1):
        check_batch(task, kind)
        assert (kind.inputs[:, 0] == 3 + k).all()


@given(st.integers(2, 40), st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**31 - 1))
def test_any_sizes(length, hops, symbols, seed):
    task = KHop(length, hops, symbols)
    batch = task.batch(4, generator(seed))
    check_shapes(task, batch, 4, length)
    check_batch(task, batch)


def test_symbols_and_hops_are_uniform():
    task, n = KHop(6, 3, 4), 20_000
    tokens = task.batch(n, generator()).inputs
    for values, first, choices in [(tokens[:, 0], 4, 3), *((tokens[:, i], 0, 4) for i in range(1, 6))]:
        shares = (values - first).bincount(minlength=choices) / n
        assert ((shares - 1 / choices).abs() <= 4.5 * (1 / choices / n) ** 0.5).all()


def test_about_half_is_none_at_eight_hops_of_48_tokens():
    given_answers = answers(KHop().held_out(500, 0)["hops=8"])
    assert 0.4 < given_answers.count(4) / len(given_answers) < 0.6


def test_scores():
    task = KHop()
    batch = task.batch(64, generator())
    logits = perfect(batch, task.outputs)
    assert task.scores(logits, batch) == {"accuracy": 1.0, "found_accuracy": 1.0}
    assert task.loss(logits, batch) < 1e-6
    assert task.score in task.scores(logits, batch)
    given_answers = answers(batch)
    found = [a for a in given_answers if a < 4]
    ones, none = (task.scores(constant(batch, 5, answer), batch) for answer in (1, 4))
    assert ones["accuracy"] == pytest.approx(given_answers.count(1) / len(given_answers))
    assert ones["found_accuracy"] == pytest.approx(found.count(1) / len(found))
    assert ones["found_accuracy"] == pytest.approx(1 / 4, rel=0.1)
    assert none["accuracy"] == pytest.approx(given_answers.count(4) / len(given_answers))
    assert none["found_accuracy"] == 0
    assert float(task.loss(torch.zeros_like(logits), batch)) == pytest.approx(math.log(5))


def test_no_symbol_to_be_found_has_no_accuracy():
    task = KHop(length=3, hops=2)
    batch = task.batch(4, generator())
    scores = task.scores(perfect(batch, task.outputs), batch)
    assert scores["accuracy"] == 1
    assert math.isnan(scores["found_accuracy"])


def test_randomness_and_refusals():
    check_randomness(KHop())
    check_refusals(KHop(8))
    for name, wrong, words in [
        ("length", 1, "`length` must be at least 2, but got 1"),
        ("symbols", 1, "`symbols` must be at least 2, but got 1"),
        ("hops", 0, "`hops` must be an integer > 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            KHop(**{name: wrong})
