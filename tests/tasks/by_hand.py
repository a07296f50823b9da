"""What the tests of tasks share: predictors whose figures are known, and what every task has to keep."""

from itertools import pairwise

import pytest
import torch

from implicit_attention.tasks.task import IGNORED, Batch, Task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perfect(batch: Batch, outputs: int) -> torch.Tensor:
    """Logits that are sure of every answer, and of nonsense where nothing is asked."""
    logits = torch.zeros(*batch.targets.shape, outputs)
    for b, row in enumerate(batch.targets.tolist()):
        for i, answer in enumerate(row):
            logits[b, i, answer if answer != IGNORED else (b + i) % outputs] = 50.0
    return logits


def constant(batch: Batch, outputs: int, answer: int) -> torch.Tensor:
    logits = torch.zeros(*batch.targets.shape, outputs)
    logits[..., answer] = 1.0
    return logits


def answers(batch: Batch) -> list[int]:
    return [answer for row in batch.targets.tolist() for answer in row if answer != IGNORED]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(s.nan_to_num(-1), t.nan_to_num(-1)) for s, t in zip(a, b, strict=True))


def check_randomness(task: Task) -> None:
    """Batches come from the generator alone, held-out ones from the seed alone, and the two differ."""
    torch.manual_seed(1)
    first = task.batch(4, generator(3))
    held_out = task.held_out(4, 3)
    torch.manual_seed(2)
    stream = generator(3)
    again, following = task.batch(4, stream), task.batch(4, stream)
    assert same(first, again)
    assert not same(first, following)
    assert not same(first, task.batch(4, generator(4)))
    assert held_out.keys() == task.held_out(4, 3).keys()
    for kind, batch in held_out.items():
        assert same(batch, task.held_out(4, 3)[kind])
        assert not same(batch, task.held_out(4, 4)[kind])
        assert batch.inputs.shape != first.inputs.shape or not same(batch, first)
    for a, b in pairwise(held_out.values()):
        n = min(a.inputs.shape[1], b.inputs.shape[1])
        assert not torch.equal(a.inputs[0, 1:n], b.inputs[0, 1:n]), "every kind has a stream of its own"


def check_refusals(task: Task) -> None:
    """Sizes and seeds that cannot work, and logits of another shape, are refused in words."""
    with pytest.raises(TypeError, match=r"`size` must be an integer > 0, but got 1\.5"):
        task.batch(1.5, generator())
    with pytest.raises(ValueError, match="`size`"):
        task.held_out(0, 0)
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0"):
        task.held_out(2, -1)
    batch = task.batch(2, generator())
    wrong = torch.zeros(2, batch.inputs.shape[1] + 1, task.outputs)
    for judge in (task.loss, task.scores):
        with pytest.raises(ValueError, match=r"`logits` must be of shape \[B, N, outputs\]"):
            judge(wrong, batch)


def check_shapes(task: Task, batch: Batch, size: int, length: int) -> None:
    assert batch.inputs.shape == batch.targets.shape == (size, length)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.inputs
    assert all(0 <= answer < task.outputs for answer in answers(batch))
