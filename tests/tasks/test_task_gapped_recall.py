"""Recall with gaps, by its definition: read back from the tokens alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import GappedRecall
from implicit_attention.tasks.task import IGNORED
from tests.tasks.by_hand import check_randomness, check_refusals, check_shapes, constant, generator, perfect


def read(task, tokens):
    """The pairs of a sequence and their gaps, from the alphabets of its tokens."""
    pairs, gaps, key, gap = {}, [], (), 0
    shown = tokens[: task.length - task.pairs * task.key_tokens]
    for token in shown:
        if token < task.alphabet:
            key, gap = (*key, token), 0
        elif token < 2 * task.alphabet:
            assert len(key) == task.key_tokens
            pairs[key] = token - task.alphabet
            gaps.append(gap)
            key = ()
        else:
            gap += 1
    return pairs, gaps


def check_batch(task, batch):
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        pairs, gaps = read(task, tokens)
        assert len(pairs) == task.pairs, "keys differ"
        assert all(0 <= gap <= task.fillers for gap in gaps)
        k, asked = task.key_tokens, task.length - task.pairs * task.key_tokens
        assert set(targets[:asked]) <= {IGNORED}
        back = [tuple(tokens[i : i + k]) for i in range(asked, task.length, k)]
        assert sorted(back) == sorted(pairs)
        assert targets[asked + k - 1 :: k] == [pairs[key] for key in back]
        assert sum(target != IGNORED for target in targets) == task.pairs
    return [read(task, tokens)[1] for tokens in batch.inputs.tolist()]


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 3), st.integers(6, 20), st.integers(0, 2**31 - 1))
def test_any_sizes(pairs, fillers, key_tokens, alphabet, seed):
    task = GappedRecall(pairs, fillers, key_tokens, alphabet)
    batch = task.batch(5, generator(seed))
    check_shapes(task, batch, 5, task.length)
    check_batch(task, batch)


def test_kinds_have_the_gaps_they_are_named_after():
    found = GappedRecall().held_out(50, 0)
    assert list(found) == ["fillers=0", "fillers=3", "fillers=6", "fillers=mixed"]
    for kind, batch in found.items():
        gaps = {gap for row in check_batch(GappedRecall(), batch) for gap in row}
        assert gaps == (set(range(7)) if kind == "fillers=mixed" else {int(kind.partition("=")[2])})


def test_tokens_of_long_keys_are_shared():
    task, shared = GappedRecall(key_tokens=2), 0
    for tokens in task.batch(100, generator()).inputs.tolist():
        first, last = zip(*read(task, tokens)[0], strict=True)
        shared += len(set(first)) < len(first) and len(set(last)) < len(last)
    assert shared > 95


def test_scores():
    task = GappedRecall()
    batch = task.batch(20, generator())
    assert task.scores(perfect(batch, task.outputs), batch) == {"accuracy": 1.0}
    assert task.scores(constant(batch, task.outputs, 3), batch)["accuracy"] == pytest.approx(1 / 32, abs=0.04)
    assert float(task.loss(torch.zeros(20, task.length, 32), batch)) == pytest.approx(torch.tensor(32.0).log().item())


def test_randomness_and_refusals():
    check_randomness(GappedRecall())
    check_refusals(GappedRecall())
    with pytest.raises(ValueError, match="`alphabet` must be at least 2 and at least pairs=6"):
        GappedRecall(alphabet=5)
    with pytest.raises(ValueError, match="`fillers`"):
        GappedRecall(fillers=-1)
