"""Python's source as bytes, against its files read one by one and bigrams collected one by one."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import Batch, ByteText, standard_library_files
from implicit_attention.tasks.byte_text import library, repeated_bigrams
from implicit_attention.tasks.text import held_out_files
from implicit_attention.training import corpus
from tests.tasks.by_hand import check_randomness, check_refusals, check_shapes, constant, generator, perfect


def parts():
    root, files = standard_library_files()
    training, held_out = b"", b""
    for path in files:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
        if int(digest, 16) % 10 == 0:
            held_out += path.read_bytes()
        else:
            training += path.read_bytes()
    return training, held_out


def repeats(window):
    """Of `window[i], window[i + 1]`: has that been seen in the same window?"""
    seen, found = set(), []
    for i in range(len(window) - 1):
        found.append((window[i], window[i + 1]) in seen)
        seen.add((window[i], window[i + 1]))
    return found


def whole(batch):
    return [[*a, b[-1]] for a, b in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)]


def test_windows_come_from_their_own_part_of_the_text():
    training, held_out = parts()
    task = ByteText(length=200)
    for batch, text, other in [
        (task.batch(16, generator()), training, held_out),
        (task.held_out(16, 0)["held_out"], held_out, training),
    ]:
        check_shapes(task, batch, 16, 200)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        cut = [bytes(window) for window in whole(batch)]
        assert all(window in text for window in cut)
        assert not all(window in other for window in cut)


def test_the_split_is_that_of_training_runs():
    text = corpus.read("default")
    assert torch.equal(library(held_out=False), text.training)
    assert torch.equal(library(held_out=True), text.held_out)
    root, files = standard_library_files()
    assert held_out_files(root, files[:1]) == set(files[:1]), "of a single file, that one"
    assert len(held_out_files(root, files[:2])) == 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=4))
def test_repeated_bigrams(rows):
    window = torch.tensor(rows)
    found = repeated_bigrams(Batch(window[:, :-1], window[:, 1:]))
    assert found.tolist() == [repeats(row) for row in rows]


@given(st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_any_length(length, seed):
    task = ByteText(length)
    batch = task.batch(3, generator(seed))
    check_shapes(task, batch, 3, length)
    assert repeated_bigrams(batch).tolist() == [repeats(window) for window in whole(batch)]


def test_scores_are_bits_of_the_two_kinds_of_positions():
    task = ByteText(32)
    batch = task.batch(8, generator())
    logits = torch.randn(8, 32, 256, generator=generator()).double()
    bits, again = [], []
    for window, row in zip(whole(batch), logits.tolist(), strict=True):
        again += repeats(window)
        for i, values in enumerate(row):
            total = sum(math.exp(v) for v in values)
            bits.append(-math.log2(math.exp(values[window[i + 1]]) / total))
    scores = task.scores(logits, batch)
    mean = sum(bits) / len(bits)
    old, new = ([b for b, r in zip(bits, again, strict=True) if r == which] for which in (True, False))
    wanted = {
        "-bits_per_byte": -mean,
        "bits_per_byte": mean,
        "repeat_bits_per_byte": sum(old) / len(old),
        "new_bits_per_byte": sum(new) / len(new),
        "repeat_share": len(old) / len(bits),
    }
    assert scores == pytest.approx(wanted, rel=1e-6)
    assert task.score in scores
    assert float(task.loss(logits, batch)) == pytest.approx(mean * math.log(2), rel=1e-6)


def test_a_perfect_model_needs_no_bits_and_one_that_knows_nothing_eight():
    task = ByteText()
    batch = task.held_out(4, 0)["held_out"]
    assert task.scores(perfect(batch, 256), batch)["bits_per_byte"] < 1e-6
    knows_nothing = task.scores(torch.zeros(4, 128, 256), batch)
    assert knows_nothing["bits_per_byte"] == pytest.approx(8)
    assert knows_nothing["repeat_bits_per_byte"] == pytest.approx(8)
    assert 0.2 < knows_nothing["repeat_share"] < 0.8
    space = task.scores(50 * constant(batch, 256, 32), batch)
    assert space["bits_per_byte"] == pytest.approx(50 / math.log(2) * float((batch.targets != 32).float().mean()))


def test_a_window_without_repeats_has_no_figure_for_them():
    batch = Batch(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    scores = ByteText(2).scores(torch.zeros(1, 2, 256), batch)
    assert math.isnan(scores["repeat_bits_per_byte"])
    assert scores["new_bits_per_byte"] == pytest.approx(8)


def test_randomness_and_refusals():
    check_randomness(ByteText())
    check_refusals(ByteText(16))
    with pytest.raises(ValueError, match="`length` must be an integer > 0"):
        ByteText(0)
    with pytest.raises(ValueError, match="at least length=100000001 bytes"):
        ByteText(100_000_000).batch(1, generator())
