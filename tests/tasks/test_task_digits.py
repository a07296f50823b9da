"""Digits with hidden pixels, against scikit-learn's own images taken pixel by pixel."""

import hashlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from implicit_attention.tasks import Digits
from implicit_attention.tasks.digits import digits
from tests.tasks.by_hand import check_randomness, check_refusals, generator

IMAGES = [tuple(int(v) for v in image) for image in load_digits().data.tolist()]
KEPT = {i for i in range(len(IMAGES)) if int(hashlib.sha256(str(i).encode()).hexdigest(), 16) % 5 == 0}
TRAINING = {image for i, image in enumerate(IMAGES) if i not in KEPT}
HELD_OUT = {image for i, image in enumerate(IMAGES) if i in KEPT}


def restored(batch):
    """Put the images together again, in whole numbers, and count the hidden pixels of each."""
    images, hidden = [], []
    for features, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        image = []
        for place, ((value, is_hidden, *places), target) in enumerate(zip(features, targets, strict=True)):
            assert places.index(1) == place
            assert sum(places) == 1
            assert is_hidden in (0, 1)
            assert math.isnan(target) == (not is_hidden)
            assert value == 0 or not is_hidden
            image.append(16 * (target if is_hidden else value))
        images.append(tuple(image))
        hidden.append(sum(is_hidden for _, is_hidden, *_ in features))
    return images, hidden


def test_images_are_split_by_a_hash_of_their_index():
    assert len(TRAINING) + len(HELD_OUT) == len(IMAGES) == 1797, "no image comes twice"
    assert 0.15 < len(HELD_OUT) / len(IMAGES) < 0.25
    assert [tuple((16 * v).tolist()) for v in digits().held_out] == [IMAGES[i] for i in sorted(KEPT)]


@given(st.integers(1, 64), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_a_share_of_the_pixels_is_hidden(masked, size, seed):
    task = Digits(masked)
    for batch, wanted in [
        (task.batch(size, generator(seed)), TRAINING),
        (task.held_out(size, seed)["held_out"], HELD_OUT),
    ]:
        assert batch.inputs.shape == (size, task.length, task.inputs)
        assert batch.targets.shape == (size, task.length)
        assert batch.inputs.dtype == batch.targets.dtype == torch.float32
        images, hidden = restored(batch)
        assert set(images) <= wanted
        assert hidden == [masked] * size


def test_every_pixel_is_hidden_as_often_and_every_image_drawn():
    n = 20_000
    batch = Digits().batch(n, generator())
    shares = batch.inputs[..., 1].mean(0)
    assert ((shares - 0.5).abs() < 4.5 * 0.5 / n**0.5).all()
    images = torch.where(batch.targets.isnan(), batch.inputs[..., 0], batch.targets)
    assert len(images.unique(dim=0)) == len(TRAINING)


def test_more_held_out_than_there_are_come_round_again():
    n = len(HELD_OUT)
    batch = Digits().held_out(2 * n + 3, 0)["held_out"]
    images, _ = restored(batch)
    assert set(images[:n]) == set(images[n : 2 * n]) == HELD_OUT
    assert images[:n] != images[n : 2 * n]
    assert not torch.equal(batch.inputs[:n, :, 1], batch.inputs[n : 2 * n, :, 1])


def test_scores_of_perfect_and_of_constant_completions():
    task = Digits()
    batch = task.held_out(64, 0)["held_out"]
    perfect = batch.targets.nan_to_num(7.0)[..., None]
    assert task.loss(perfect, batch) == 0
    assert task.scores(perfect, batch) == {"-squared_error": 0, "squared_error": 0}
    hidden = [v for row in batch.targets.tolist() for v in row if not math.isnan(v)]
    assert len(hidden) == 64 * 32
    wanted = sum((v - 0.3) ** 2 for v in hidden) / len(hidden)
    scores = task.scores(torch.full((64, 64, 1), 0.3), batch)
    assert scores["squared_error"] == pytest.approx(wanted, rel=1e-5)
    assert scores[task.score] == -scores["squared_error"]


def test_gradients_reach_the_hidden_pixels_alone():
    task = Digits()
    batch = task.batch(4, generator())
    logits = torch.zeros(4, 64, 1, requires_grad=True)
    task.loss(logits, batch).backward()
    wanted = torch.where(batch.targets.isnan(), 0, -2 * batch.targets / (4 * 32))
    torch.testing.assert_close(logits.grad[..., 0], wanted)
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32


def test_randomness_and_refusals():
    check_randomness(Digits())
    check_refusals(Digits())
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="`masked`"):
            Digits(wrong)
    with pytest.raises(ValueError, match=r"`logits` must be of shape \[B, 64, 1\]"):
        Digits().loss(torch.zeros(2, 64, 2), Digits().batch(2, generator()))


def test_scikit_learn_is_loaded_when_it_is_used_and_missed_in_words(monkeypatch):
    code = "import sys, implicit_attention.tasks as t; t.Digits(); print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.cache_clear()
    with pytest.raises(ImportError, match="needs scikit-learn: pip install scikit-learn"):
        Digits().batch(2, generator())


def test_figures_of_the_docstring():
    training, held_out = digits()[:2]
    for guess, wanted in ((training.mean(0), 0.073), (training.mean(), 0.141)):
        assert float((held_out - guess).square().mean()) == pytest.approx(wanted, abs=5e-4)
