"""Parity and the word problems of groups, against one element after the other, applied to a row of things."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import GroupWords, Parity
from tests.tasks.by_hand import (
    answers,
    check_randomness,
    check_refusals,
    check_shapes,
    constant,
    generator,
    perfect,
)

TASKS = [Parity(), GroupWords(), GroupWords(group="A5")]


def named(task):
    return getattr(task, "group", "parity")


def parities(bits):
    return [sum(bits[: i + 1]) % 2 for i in range(len(bits))]


def elements(group):
    """The permutations of S3; of A5 those that are products of two swaps, hence even."""
    if group == "S3":
        return sorted(itertools.permutations(range(3)))
    swaps = []
    for i, j in itertools.combinations(range(5), 2):
        row = list(range(5))
        row[i], row[j] = row[j], row[i]
        swaps.append(row)
    found = {tuple(range(5))}
    while True:
        more = found | {tuple(a[b[t]] for t in p) for p in found for a in swaps for b in swaps}
        if more == found:
            return sorted(found)
        found = more


def arrangements(group, words):
    """Apply a word to the things 0, 1, 2, ...: where is each after every letter? Which element did that?"""
    listed, state, numbers = elements(group), None, []
    state = list(range(len(listed[0])))
    for letter in words:
        state = [listed[letter][place] for place in state]
        numbers.append(listed.index(tuple(state)))
    return numbers


def check_batch(task, batch):
    slow = parities if isinstance(task, Parity) else lambda words: arrangements(task.group, words)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert targets == slow(tokens)


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_every_prefix_is_answered(task):
    batch = task.batch(32, generator())
    check_shapes(task, batch, 32, task.train_length)
    check_batch(task, batch)
    held_out = task.held_out(2, 0)
    assert list(held_out) == [f"length={n}" for n in task.judged]
    for n, kind in zip(task.judged, held_out.values(), strict=True):
        check_shapes(task, kind, 2, n)
        check_batch(task, kind)
    assert task.length == max(task.judged)
    assert set(task.batch(200, generator()).inputs.flatten().tolist()) == set(range(task.inputs))


def test_published_protocols():
    assert (Parity().train_length, Parity().judged) == (40, (40, 64, 128, 256))
    assert (GroupWords().train_length, GroupWords().judged) == (32, (32, 64, 128))
    assert [task.inputs for task in TASKS] == [task.outputs for task in TASKS] == [2, 6, 60]


def test_a_group_does_not_commute_and_its_order_is_that_of_the_word():
    """In S3 the swap of the first two, then of the last two: 0 goes to 1 and on to 2."""
    s3 = elements("S3")
    swap, other = s3.index((1, 0, 2)), s3.index((0, 2, 1))
    batch = GroupWords().batch(2000, generator())
    seen = [i for i, word in enumerate(batch.inputs[:, :2].tolist()) if word == [swap, other]]
    assert seen
    assert {int(batch.targets[i, 1]) for i in seen} == {s3.index((2, 0, 1))}


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["parity", "S3", "A5"]), st.integers(0, 2**31 - 1))
def test_any_lengths(train_length, judged, group, seed):
    sizes = (train_length, (judged,))
    task = Parity(*sizes) if group == "parity" else GroupWords(*sizes, group=group)
    assert task.length == max(train_length, judged)
    batch = task.batch(3, generator(seed))
    check_shapes(task, batch, 3, train_length)
    check_batch(task, batch)
    check_batch(task, task.held_out(3, seed)[f"length={judged}"])


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_scores(task):
    batch = task.batch(400, generator())
    logits = perfect(batch, task.outputs)
    assert task.scores(logits, batch) == dict.fromkeys(("accuracy", "last_quarter_accuracy", "whole_accuracy"), 1.0)
    assert task.loss(logits, batch) < 1e-6
    assert task.score in task.scores(logits, batch)
    guess = task.scores(constant(batch, task.outputs, 1), batch)
    given_answers = answers(batch)
    assert guess["accuracy"] == pytest.approx(given_answers.count(1) / len(given_answers))
    assert guess["accuracy"] == pytest.approx(1 / task.outputs, rel=0.2)
    assert guess["whole_accuracy"] == 0
    assert float(task.loss(torch.zeros_like(logits), batch)) == pytest.approx(math.log(task.outputs))


def test_scores_by_place():
    task = Parity(train_length=8)
    batch = task.batch(4, generator())
    logits = perfect(batch, 2)
    logits[0, 5] = -logits[0, 5]  # one wrong before the last quarter
    assert task.scores(logits, batch) == {"accuracy": 31 / 32, "last_quarter_accuracy": 1.0, "whole_accuracy": 0.75}
    logits[0, 6] = -logits[0, 6]  # one more, in it
    assert task.scores(logits, batch) == {"accuracy": 30 / 32, "last_quarter_accuracy": 7 / 8, "whole_accuracy": 0.75}


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_randomness_and_refusals(task):
    check_randomness(task)
    check_refusals(task)
    with pytest.raises(ValueError, match="`train_length` must be an integer > 0"):
        type(task)(train_length=0)
    with pytest.raises(ValueError, match="`judged` must be an integer > 0"):
        type(task)(judged=(3, 0))
    for wrong in ([3], (), 3):
        with pytest.raises(TypeError, match="`judged` must be a tuple of lengths, at least one"):
            type(task)(judged=wrong)


def test_unknown_group():
    with pytest.raises(ValueError, match="`group` must be one of 'S3', 'A5', but got 'S4'"):
        GroupWords(group="S4")
