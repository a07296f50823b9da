"""The models against NumPy: every kind of block, with and without padding; outputs, losses, inputs."""

import numpy as np
import pytest
import torch

from implicit_attention.hf import (
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForMaskedLM,
    ImplicitAttentionForSequenceClassification,
    ImplicitAttentionModel,
    SolverStats,
)
from implicit_attention.hf.outputs import stack_stats
from tests.hf import reference, tiny

CAUSAL = {
    "implicit": {},
    "ordinary": {"layer_types": ["attention", "attention"]},
    "mixed": {"layer_types": ["implicit", "attention"]},
    "input-diagonal": {"self_query": "input"},
    "plain": {"qk_norm": False, "positions": None, "out_proj": False},
    "bias-query-input": {"bias": True, "query_input": True, "layer_types": ["attention", "implicit"]},
    "relative": {"positions": {"name": "relative", "max_distance": 3}, "layer_types": ["implicit", "attention"]},
    "rope-base": {"positions": {"name": "rope", "base": 50.0}, "layer_types": ["attention", "implicit"]},
    "identity": {"values": "identity", "scale": 0.3, "layer_types": ["attention", "implicit"]},
}
BIDIRECTIONAL = {
    "implicit": {},
    "ordinary": {"layer_types": ["attention", "attention"]},
    "mixed": {"layer_types": ["attention", "implicit"], "positions": None},
}
CASES = [pytest.param({"is_causal": True} | options, id=f"causal-{name}") for name, options in CAUSAL.items()]
CASES += [
    # Weights small enough to contract: without a causal mask there may be no equilibrium to be found.
    pytest.param({"is_causal": False, "initializer_range": 0.1, "max_gain": None} | options, id=f"bidirectional-{name}")
    for name, options in BIDIRECTIONAL.items()
]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def padded():
    """Three rows: whole, padded on the left, padded on the right."""
    hidden = np.zeros((3, 9), dtype=bool)
    hidden[1, :4], hidden[2, -3:] = True, True
    return hidden


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_model_is_what_numpy_says(options, padding):
    solver = {"name": "forward_substitution" if options["is_causal"] else "anderson"} | TIGHT
    model = tiny.make(ImplicitAttentionModel, **({"solver": solver} | options))
    tokens, hidden = tiny.tokens(3), padded() if padding else np.zeros((3, 9), dtype=bool)
    mask = torch.from_numpy(~hidden).long() if padding else None
    with torch.no_grad():
        out = model(tokens, mask, output_hidden_states=True, output_attentions=True)
    last, states, attentions = reference.last_hidden_state(model, tokens, hidden)
    seen = ~hidden  # what stands at padding is nobody's business
    np.testing.assert_allclose(out.last_hidden_state.numpy()[seen], last[seen], rtol=0, atol=1e-9)
    assert len(out.hidden_states) == len(states)
    for found, expected in zip(out.hidden_states, states, strict=True):
        np.testing.assert_allclose(found.numpy()[seen], expected[seen], rtol=0, atol=1e-9)
    for found, expected in zip(out.attentions, attentions, strict=True):
        np.testing.assert_allclose(found.numpy().swapaxes(1, 2)[seen], expected.swapaxes(1, 2)[seen], rtol=0, atol=1e-9)


def test_alibi_prefers_what_is_near():
    """Both kinds of block get the same penalty, of which NumPy knows nothing here."""
    for kind in ("implicit", "attention"):
        model = tiny.make(ImplicitAttentionModel, positions="alibi", layer_types=[kind] * 2)
        with torch.no_grad():
            for block in model.layers:
                block.attention.W_K.weight.zero_()  # no score but the penalty
            weights = model(tiny.tokens(), output_attentions=True).attentions[0]
        offset = torch.arange(9)[:, None] - torch.arange(9)
        slopes = 2.0 ** -torch.arange(2.0, 9.0, 2.0, dtype=torch.float64)
        expected = (-slopes[:, None, None] * offset).masked_fill(offset < 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights, expected.expand_as(weights))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_input": True},
        {"bias": True, "query_input": True},
        {"values": "identity"},
        {"out_proj": False, "positions": "relative"},
    ],
    ids=str,
)
def test_ordinary_model_has_as_many_parameters(options):
    sizes = {"hidden_size": 64, "intermediate_size": 160, **options}
    counts = [tiny.make(layer_types=[kind] * 2, **sizes).num_parameters() for kind in ("implicit", "attention")]
    assert abs(counts[0] - counts[1]) < 0.02 * counts[0]


def test_statistics_count_implicit_layers_only():
    tokens = tiny.tokens()
    assert tiny.make(layer_types=["attention"] * 2)(tokens).solver_stats is None
    stats = tiny.make(layer_types=["attention", "implicit"])(tokens).solver_stats
    assert isinstance(stats, SolverStats)
    assert stats.steps.shape == stats.residual.shape == stats.unconverged.shape == (1,)
    assert stats.steps[0] > 0
    assert not stats.unconverged.any()
    assert not stats.residual.requires_grad


def test_statistics_by_name_and_as_a_tree():
    model, tokens = tiny.make(dtype=torch.float32), tiny.tokens()
    for stats in (model(tokens).solver_stats, model(tokens, output_gains=True).solver_stats):
        for name in ("steps", "residual", "unconverged", "gain"):
            assert stats[name] is getattr(stats, name)
        paths, spec = torch.utils._pytree.tree_flatten_with_path(stats)
        assert all(stats[key.name] is figures for (key,), figures in paths)
        copied = torch.utils._pytree.tree_unflatten([figures for _, figures in paths], spec)
        assert vars(copied) == vars(stats)
    with pytest.raises(KeyError, match="step"):
        stats["step"]


def test_whole_outputs_under_transforms():
    """`torch.func` takes no None for an output: gains that were not measured are none."""
    model, tokens = tiny.make(dtype=torch.float32), tiny.tokens()
    each = torch.func.vmap(lambda one: model(one[None], use_cache=False))(tokens)
    for i, one in enumerate(tokens):
        alone = model(one[None], use_cache=False)
        torch.testing.assert_close(each.logits[i], alone.logits)
        assert torch.equal(each.solver_stats.steps[i], alone.solver_stats.steps)
    assert each.solver_stats.gain is None


def test_statistics_of_layers_on_several_devices():
    layers = [{"steps": torch.zeros((), device=device)} for device in ("meta", "cpu")]
    layers = [layer | dict.fromkeys(("residual", "unconverged"), layer["steps"]) for layer in layers]
    assert {figures.device.type for figures in stack_stats(layers) if figures is not None} == {"meta"}


def test_gains_are_measured_if_they_are_asked_for():
    model, tokens = tiny.make(ImplicitAttentionModel), tiny.tokens()
    assert model(tokens).solver_stats.gain is None
    found = model(tokens, output_gains=True, output_hidden_states=True)
    for i, (block, x) in enumerate(zip(model.layers, found.hidden_states, strict=False)):
        gain = block.attention.solve(block.attention_norm(x), gains=True).gain
        assert found.solver_stats.gain[i].item() == pytest.approx(gain.max().item(), rel=1e-12)
    model.config.output_gains = True
    torch.testing.assert_close(model(tokens).solver_stats.gain, found.solver_stats.gain)
    both_ways = tiny.make(ImplicitAttentionModel, is_causal=False, initializer_range=0.1)
    with pytest.raises(ValueError, match=r"`output_gains` must be False unless is_causal=True.*spectral_radius"):
        both_ways(tokens, output_gains=True)


def test_statistics_show_what_did_not_converge():
    lazy = {"name": "picard", "max_steps": 1}
    model = tiny.make(solver=lazy, on_failure="ignore", self_query="output")
    stats = model(tiny.tokens()).solver_stats
    assert (stats.unconverged > 0.5).all()
    assert (stats.residual > 1e-3).all()


def test_causal_loss_shifts_labels_and_ignores_minus_100():
    model, tokens = tiny.make(), tiny.tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    out = model(tokens, labels=labels)
    scores = out.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    expected = -torch.cat([scores[0, 4:], scores[1]]).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)  # transformers takes losses in float32
    summed = model(tokens, labels=labels, num_items_in_batch=7).loss
    assert summed.item() == pytest.approx(expected.item() * 12 / 7, rel=1e-6)


def test_masked_loss_does_not_shift():
    model, tokens = tiny.make(ImplicitAttentionForMaskedLM, is_causal=False, initializer_range=0.1), tiny.tokens()
    labels = torch.full_like(tokens, -100)
    labels[:, 3] = tokens[:, 3]
    out = model(tokens, labels=labels)
    expected = -out.logits[:, 3].log_softmax(-1).gather(-1, tokens[:, 3:4]).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_classifier_reads_no_padding(is_causal):
    options = {"is_causal": is_causal, "num_labels": 3, "initializer_range": 0.1}
    model = tiny.make(ImplicitAttentionForSequenceClassification, **options)
    tokens, mask = tiny.tokens(3), torch.from_numpy(~padded()).long()
    out = model(tokens, mask, labels=torch.tensor([0, 2, 1]))
    assert out.logits.shape == (3, 3)
    assert out.loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2, 1])).item(), rel=1e-6
    )
    for i in range(3):
        alone = model(tokens[i : i + 1][:, mask[i] == 1]).logits[0]
        torch.testing.assert_close(out.logits[i], alone, rtol=0, atol=1e-7)
    other = tokens.masked_fill(mask == 0, 7)
    torch.testing.assert_close(model(other, mask).logits, out.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("regression", [[0.5], [2.0]]), ("multi_label_classification", [[1.0, 0.0], [0.0, 0.0]])],
)
def test_classifier_follows_problem_type(problem, labels):
    labels = torch.tensor(labels)
    model = tiny.make(
        ImplicitAttentionForSequenceClassification, torch.float32, num_labels=labels.shape[1], problem_type=problem
    )
    out = model(tiny.tokens(), labels=labels)
    loss = torch.nn.MSELoss() if problem == "regression" else torch.nn.BCEWithLogitsLoss()
    torch.testing.assert_close(out.loss, loss(out.logits, labels))


def test_embeddings_in_the_place_of_tokens():
    model, tokens = tiny.make(), tiny.tokens()
    out = model(inputs_embeds=model.get_input_embeddings()(tokens))
    torch.testing.assert_close(out.logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["call", "configuration"])
def test_tuple_holds_what_the_output_holds(by):
    model, tokens = tiny.make(), tiny.tokens()
    out = model(tokens, labels=tokens, output_attentions=True)
    given = {"return_dict": False} if by == "call" else {}
    model.config.return_dict = by == "call"
    found = model(tokens, labels=tokens, output_attentions=True, **given)
    assert isinstance(found, tuple)
    assert len(found) == len(out.to_tuple())
    torch.testing.assert_close(found[1], out.logits, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(keep):
    model, tokens = tiny.make(), tiny.tokens()
    all_logits = model(tokens).logits
    expected = all_logits[:, -keep:] if isinstance(keep, int) else all_logits[:, keep]
    torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, expected)


def test_config_flags_are_the_calls_defaults():
    model, tokens = tiny.make(), tiny.tokens()
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(tokens)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert model(tokens, output_attentions=False).attentions is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`input_ids` must be given unless `inputs_embeds` is"),
        ({"input_ids": tiny.tokens(), "inputs_embeds": torch.zeros(2, 9, 32)}, "and not both"),
        ({"input_ids": tiny.tokens(), "attention_mask": torch.ones(2, 8)}, r"`attention_mask` must be of shape \(2, 9"),
        ({"input_ids": tiny.tokens(), "attention_mask": torch.ones(2, 1, 9, 8)}, r"`attention_mask` must be of shape"),
        ({"input_ids": tiny.tokens(), "attention_mask": [1]}, "`attention_mask` must be a tensor"),
    ],
)  # fmt: skip
def test_bad_inputs(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny.make()(**arguments)


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'positions'"):
        tiny.make()(tiny.tokens(), positions=torch.arange(9)[None])


def test_heads_refuse_the_wrong_mask():
    with pytest.raises(ValueError, match="`is_causal` must be True"):
        ImplicitAttentionForCausalLM(tiny.config(is_causal=False))
    with pytest.raises(ValueError, match="`is_causal` must be False"):
        ImplicitAttentionForMaskedLM(tiny.config())


@torch.no_grad()
def test_an_encoder_returns_no_cache():
    """It would be refused in the next call."""
    model = tiny.make(ImplicitAttentionModel, is_causal=False)
    assert model(tiny.tokens(), use_cache=True).cache is None
