"""Classes of digits and hidden bytes, against scikit-learn's labels and the text itself."""

import pytest
import torch
from sklearn.datasets import load_digits

from implicit_attention.tasks import DigitClasses, MaskedBytes
from implicit_attention.tasks.byte_text import library
from implicit_attention.tasks.task import IGNORED
from tests.tasks.by_hand import check_randomness, check_refusals, check_shapes, constant, generator, perfect

LABELS = {tuple(int(v) for v in image): int(label) for image, label in zip(*load_digits(return_X_y=True), strict=True)}


@pytest.mark.parametrize("kind", ["training", "held out"])
def test_images_have_their_labels(kind):
    task = DigitClasses()
    batch = task.batch(50, generator()) if kind == "training" else task.held_out(50, 0)["held_out"]
    for features, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        image = tuple(round(16 * value) for value, *_ in features)
        assert targets == [LABELS[image]] + [IGNORED] * 63
        assert [places.index(1) for _, *places in features] == list(range(64))
        assert all(sum(places) == 1 for _, *places in features)


def test_no_image_is_in_both_parts():
    task = DigitClasses()
    held_out = {tuple(image) for image in task.held_out(10_000, 0)["held_out"].inputs[..., 0].tolist()}
    training = {tuple(image) for image in task.batch(5_000, generator()).inputs[..., 0].tolist()}
    assert len(held_out) > 300
    assert not held_out & training


def test_an_answer_is_the_mean_over_positions():
    task = DigitClasses()
    batch = task.batch(30, generator())
    logits = torch.zeros(30, 64, 10)
    logits[torch.arange(30), torch.arange(30), batch.targets[:, 0]] = 64.0  # one position says it, wherever it is
    assert task.scores(logits, batch) == {"accuracy": 1.0}
    expected = torch.log(torch.e + torch.tensor(9.0)) - 1
    assert float(task.loss(logits, batch)) == pytest.approx(float(expected))


def test_hidden_bytes_are_those_of_the_text():
    task, text = MaskedBytes(length=40, masked=6), bytes(library(held_out=True).tolist())
    batch = task.held_out(20, 0)["held_out"]
    assert batch.inputs.shape == batch.targets.shape == (20, 40)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert sum(token == 256 for token in tokens) == 6
        assert all((token == 256) == (target != IGNORED) for token, target in zip(tokens, targets, strict=True))
        restored = bytes(t if token == 256 else token for token, t in zip(tokens, targets, strict=True))
        assert restored in text


def test_bits_of_hidden_bytes():
    task = MaskedBytes()
    batch = task.batch(4, generator())
    check_shapes(task, batch, 4, 96)
    assert task.scores(perfect(batch, 256), batch)["bits_per_byte"] < 1e-3
    assert task.scores(torch.zeros(4, 96, 256), batch)["bits_per_byte"] == pytest.approx(8)
    assert task.scores(constant(batch, 256, 32), batch)["-bits_per_byte"] < 0


@pytest.mark.parametrize("task", [DigitClasses(), MaskedBytes()])
def test_randomness_and_refusals(task):
    check_randomness(task)
    check_refusals(task)


def test_more_hidden_than_there_are_is_refused():
    with pytest.raises(ValueError, match="`masked` must be at most length=8"):
        MaskedBytes(length=8, masked=9)
