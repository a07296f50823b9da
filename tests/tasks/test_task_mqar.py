"""Multi-query associative recall, against a reading of its sequences token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import MQAR
from implicit_attention.tasks.task import IGNORED
from tests.tasks.by_hand import answers, check_randomness, check_refusals, check_shapes, constant, generator, perfect


def check_sequence(task: MQAR, tokens: list[int], targets: list[int]) -> list[int]:
    """Read one sequence as its definition says; return the slots of its queries, in the order of their pairs."""
    pairs, half = task.pairs, task.vocabulary // 2
    value_of = {}
    for key, value in zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True):
        assert 1 <= key < half <= value < task.vocabulary
        value_of[key] = value
    assert len(value_of) == len(set(value_of.values())) == pairs, "keys are distinct, and values too"
    asked = [i for i, answer in enumerate(targets) if answer != IGNORED]
    assert all(i >= 2 * pairs and i % 2 == 0 for i in asked)
    assert sorted(tokens[i] for i in asked) == sorted(value_of), "each key comes back once"
    assert [targets[i] for i in asked] == [value_of[tokens[i]] for i in asked]
    if not task.random_fill:
        assert not any(tokens[i] for i in range(2 * pairs, task.length) if i not in asked)
    place = {tokens[i]: (i - 2 * pairs) // 2 for i in asked}
    return [place[key] for key in value_of]


PUBLISHED = [(64, 4), (128, 8), (256, 16)]


@pytest.mark.parametrize(("length", "pairs"), PUBLISHED)
@pytest.mark.parametrize("random_fill", [False, True])
def test_published_sizes(length, pairs, random_fill):
    task = MQAR(length, pairs, vocabulary=8192, random_fill=random_fill)
    batch = task.batch(16, generator())
    check_shapes(task, batch, 16, length)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        check_sequence(task, tokens, targets)


@given(st.integers(1, 5), st.integers(0, 7), st.integers(1, 9), st.booleans(), st.integers(0, 2**31 - 1))
def test_any_sizes(pairs, slots, more, random_fill, seed):
    length = 4 * pairs + 2 * slots
    task = MQAR(length, pairs, length + 2 * more, random_fill=random_fill)
    batch = task.batch(3, generator(seed))
    check_shapes(task, batch, 3, length)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        check_sequence(task, tokens, targets)


@pytest.mark.parametrize("power_a", [0.01, 1.0, 2.0])
def test_gaps_follow_the_power_law_without_replacement(power_a):
    """The first two keys' slots, in their order, against the law written out: p(a) p(b) / (1 - p(a))."""
    task, n = MQAR(16, 2, 18, power_a=power_a), 20_000
    batch = task.batch(n, generator())
    rows = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    counts = torch.zeros(6, 6, dtype=torch.float64)
    for tokens, targets in rows:
        counts[tuple(check_sequence(task, tokens, targets))] += 1
    weights = [(place + 1) ** (power_a - 1) for place in range(6)]
    p = [w / sum(weights) for w in weights]
    law = torch.tensor([[0 if a == b else p[a] * p[b] / (1 - p[a]) for b in range(6)] for a in range(6)])
    deviation = (law * (1 - law) / n).sqrt()
    assert ((counts / n - law).abs() <= 4.5 * deviation).all()


def test_fill_keys_and_values_are_uniform():
    task, n = MQAR(8, 2, 12), 20_000
    batch = task.batch(n, generator())
    keys, values = range(1, 6), range(6, 12)
    for position, choices in ((0, keys), (1, values), (2, keys), (3, values), (5, range(12))):
        counts = batch.inputs[:, position].bincount(minlength=12)
        wanted = torch.tensor([1 / len(choices) if i in choices else 0 for i in range(12)])
        assert ((counts / n - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / n).sqrt()).all()


def test_loss_and_score_count_the_queries_alone():
    task = MQAR(32, 4, 64)
    batch = task.batch(8, generator())
    logits = perfect(batch, task.outputs)
    assert task.scores(logits, batch) == {"accuracy": 1.0}
    assert task.loss(logits, batch) < 1e-6
    row, position = (batch.targets != IGNORED).nonzero()[0].tolist()
    logits[row, position] = 0.0
    assert task.scores(logits, batch)["accuracy"] == pytest.approx(31 / 32)
    assert task.score in task.scores(logits, batch)


def test_a_constant_answer_scores_chance():
    task = MQAR(32, 4, 64)
    batch = task.batch(500, generator())
    given_answers = answers(batch)
    logits = constant(batch, task.outputs, 40)
    assert task.scores(logits, batch)["accuracy"] == pytest.approx(given_answers.count(40) / len(given_answers))
    assert task.scores(logits, batch)["accuracy"] == pytest.approx(1 / 32, rel=0.3)
    assert float(task.loss(torch.zeros_like(logits), batch)) == pytest.approx(torch.tensor(64.0).log().item())
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32


def test_randomness_and_refusals():
    check_randomness(MQAR())
    check_refusals(MQAR(16, 2, 32))
    for wrong, words in [
        ({"length": 15}, "`length` must be even and at least 4 pairs = 16"),
        ({"length": 14}, "`length` must be even and at least 4 pairs = 16"),
        ({"vocabulary": 64}, "`vocabulary` must be even and more than length=64"),
        ({"vocabulary": 601}, "`vocabulary` must be even"),
        ({"pairs": 0}, "`pairs` must be an integer > 0"),
        ({"power_a": 0}, "`power_a`"),
    ]:
        with pytest.raises(ValueError, match=words):
            MQAR(**wrong)
    with pytest.raises(TypeError, match="`random_fill` must be True or False"):
        MQAR(random_fill=1)
