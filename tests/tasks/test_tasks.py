"""The tasks, by their definitions; the small models; and that training moves."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from implicit_attention import Anderson, ImplicitQueryAttention, Picard
from implicit_attention.cli import stages
from implicit_attention.tasks import OrdinaryAttention, Recall, TokenModel, standard_library, train, windows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", [Recall(), Recall(pairs=1, keys=1, values=2), Recall(pairs=5, keys=5, values=1)])
def test_recall_asks_for_the_value_that_followed_each_key(task):
    tokens, targets = task.batch(16, generator())
    assert tokens.shape == (16, task.length)
    assert targets.shape == (16, task.pairs)
    for sequence, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown, asked = sequence[: 2 * task.pairs], sequence[2 * task.pairs :]
        answers = dict(zip(shown[::2], shown[1::2], strict=True))
        assert len(answers) == task.pairs, "keys are distinct"
        assert all(0 <= k < task.keys for k in answers)
        assert all(task.keys <= v < task.vocabulary for v in answers.values())
        assert sorted(asked) == sorted(answers)
        assert [answers[k] for k in asked] == wanted


def test_recall_batches_come_from_the_generator_alone():
    task = Recall()
    torch.manual_seed(1)
    first = task.batch(4, generator(3))
    torch.manual_seed(2)
    again, other = task.batch(4, generator(3)), task.batch(4, generator(4))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


def test_recall_scores_the_last_positions_only():
    task = Recall(pairs=2, keys=4, values=4)
    _, targets = task.batch(3, generator())
    logits = torch.zeros(3, task.length, task.vocabulary)
    logits[:, -2:] = 20.0 * F.one_hot(targets, task.vocabulary)
    logits[:, :-2, 0] = 99.0
    assert task.accuracy(logits, targets) == 1.0
    assert task.loss(logits, targets) < 1e-6
    logits[0, -1] = 0.0
    assert task.accuracy(logits, targets) == pytest.approx(5 / 6)


def test_recall_refuses_more_pairs_than_keys():
    with pytest.raises(ValueError, match="`pairs` must be at most keys=32, but got 33"):
        Recall(pairs=33)
    with pytest.raises(ValueError, match="`values`"):
        Recall(values=0)
    with pytest.raises(TypeError, match="`size`"):
        Recall().batch(1.5, generator())


def test_standard_library_is_python_and_the_same_each_time():
    text = standard_library(50_000)
    assert text.dtype == torch.uint8
    assert text.shape == (50_000,)
    assert torch.equal(text, standard_library(60_000)[:50_000])
    assert b"import" in bytes(text.tolist())


def test_standard_library_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no source of the standard library"):
        standard_library()


def test_windows_are_pieces_of_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    cut = windows(text, 50, 7, generator())
    assert cut.shape == (50, 7)
    assert cut.dtype == torch.uint8
    assert (cut[:, 1:].int() - cut[:, :-1].int() == 1).all()
    assert torch.equal(windows(text, 3, 100, generator()), text.expand(3, 100))
    with pytest.raises(ValueError, match="at least length=101 bytes"):
        windows(text, 1, 101, generator())


def test_ordinary_attention_is_softmax_attention():
    torch.manual_seed(0)
    layer, x = OrdinaryAttention(8, 2, is_causal=True, qk_norm=True).double(), torch.randn(2, 5, 8).double()
    with torch.no_grad():
        layer.temperature.copy_(torch.tensor([2.0, 0.5]))
    expected = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = (x @ w.weight.T[:, part] for w in (layer.W_Q, layer.W_K, layer.W_V))
        q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        scores = layer.temperature[h] * q @ k.mT / 2
        expected.append(scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), torch.cat(expected, -1))
    assert "num_heads=2" in repr(layer)
    with pytest.raises(ValueError, match="`num_heads` must be a divisor"):
        OrdinaryAttention(8, 3)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_both_layers_have_as_many_parameters(qk_norm):
    layers = (c(64, 4, is_causal=True, qk_norm=qk_norm) for c in (OrdinaryAttention, ImplicitQueryAttention))
    ordinary, implicit = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert ordinary == implicit


@pytest.mark.parametrize("residual", [False, True])
def test_token_model_tells_how_its_layer_settled(residual):
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(8, 2, is_causal=True, out_proj=True)
    model = TokenModel(10, 6, layer, residual=residual)
    tokens = torch.randint(10, (3, 5))
    logits, solution = model.solve(tokens)
    x = model.embedding.weight[tokens] + model.positions[:5]
    expected = model.head(layer(x) + (x if residual else 0))
    torch.testing.assert_close(logits, expected)
    assert solution.converged.shape == (3, 5)
    assert solution.converged.all()
    assert TokenModel(10, 6, OrdinaryAttention(8)).solve(tokens)[1] is None


def test_training_records_every_step_and_is_reproducible():
    task = Recall(pairs=2, keys=4, values=4)

    def losses(seed):
        torch.manual_seed(0)
        model = TokenModel(task.vocabulary, task.length, OrdinaryAttention(16, 2, is_causal=True))
        return list(train(model, task, steps=25, seed=seed, batch_size=32, evaluate_every=10, held_out=16))

    steps = losses(0)
    assert [s.step for s in steps] == list(range(1, 26))
    assert [s.step for s in steps if s.accuracy is not None] == [10, 20, 25]
    assert steps[-1].loss < steps[0].loss
    assert [s.loss for s in steps] == [s.loss for s in losses(0)]
    assert [s.loss for s in steps] != [s.loss for s in losses(1)]
    assert all(a.seconds <= b.seconds for a, b in pairwise(steps))
    assert all(s.solver_steps == 0 and s.unconverged == 0 for s in steps)


def test_training_reports_solves_that_fail():
    task = Recall(pairs=2, keys=4, values=4)
    layer = ImplicitQueryAttention(16, 2, is_causal=True, solver=Picard(max_steps=1), on_failure="ignore")
    (step,) = train(TokenModel(task.vocabulary, task.length, layer), task, steps=1, seed=0, batch_size=4)
    assert step.solver_steps == 1
    assert step.unconverged > 0
    assert step.residual > 0
    with pytest.raises(ValueError, match="`steps`"):
        next(train(TokenModel(8, 6, layer), task, steps=0, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])  # the records of docs/results.md have five
def test_the_implicit_layer_and_a_convolution_learn_recall_and_the_ordinary_layer_does_not(seed):
    task = Recall()
    entrants = stages.runners(seed, task)
    for _, step in stages.race(entrants, task, steps=160, seed=seed):
        assert step.unconverged == 0
    reached = {name: runner.steps[-1].accuracy for name, runner in entrants.items()}
    assert reached[stages.IMPLICIT] >= 0.99
    assert reached[stages.ORDINARY] < 0.30
    assert reached[stages.CONVOLVED] >= 0.99
    weights = {name: runner.parameters for name, runner in entrants.items()}
    assert weights[stages.IMPLICIT] == weights[stages.ORDINARY] == weights[stages.CONVOLVED] - 64 * stages.TAPS


def test_anderson_and_picard_agree_on_a_trained_equilibrium():
    torch.manual_seed(0)
    task = Recall(pairs=4, keys=8, values=8)
    layer = ImplicitQueryAttention(16, 2, is_causal=True, qk_norm=True, self_query="input", solver=Picard())
    model = TokenModel(task.vocabulary, task.length, layer)
    *_, _ = train(model, task, steps=10, seed=0, batch_size=16, held_out=8)
    tokens = task.batch(4, generator(9)).tokens
    expected = model(tokens)
    layer.solver = Anderson()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-3, atol=1e-3)
