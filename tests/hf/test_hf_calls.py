"""Calls as transformers' own models take them: positions, caches, labels, masks, hidden states, attention functions."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from implicit_attention.hf import (
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForQuestionAnswering,
    ImplicitAttentionForSequenceClassification,
    ImplicitAttentionForTokenClassification,
    ImplicitAttentionModel,
)
from tests.hf import tiny

TIGHT = {"solver": {"name": "forward_substitution", "rtol": 1e-13, "atol": 1e-13}}
KINDS = {
    "implicit": TIGHT,
    "ordinary": {"layer_types": ["attention"] * 2},
    "mixed": {"layer_types": ["attention", "implicit"], "num_kv_heads": 2, **TIGHT},
}
EVERY_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@EVERY_KIND
@torch.no_grad()
def test_positions_are_honoured_as_rotations_are(options):
    """Only differences of positions matter to rotations: a shift changes nothing, a gap does."""
    model, tokens = tiny.make(**options), tiny.tokens()
    plain = model(tokens).logits
    places = torch.arange(9)[None]
    for shifted in (places, places + 5, (places + torch.tensor([[0], [3]]))):
        torch.testing.assert_close(model(tokens, position_ids=shifted).logits, plain, rtol=0, atol=1e-9)
    gap = torch.cat([places[:, :4], places[:, 4:] + 6], 1)
    leaping = model(tokens, torch.ones_like(tokens), position_ids=gap).logits
    torch.testing.assert_close(leaping[:, :4], plain[:, :4], rtol=0, atol=1e-9)
    assert (leaping[:, 4:] - plain[:, 4:]).abs().max() > 1e-4
    out = model(tokens[:, :4], use_cache=True)
    after = model(tokens[:, 4:], torch.ones_like(tokens), out.cache, position_ids=gap[:, 4:]).logits
    torch.testing.assert_close(after, leaping[:, 4:], rtol=0, atol=1e-9)


@EVERY_KIND
@torch.no_grad()
def test_left_padding_with_positions_is_each_alone(options):
    model, tokens = tiny.make(**options), tiny.tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(tokens[:, :7], mask[:, :7], position_ids=positions[:, :7], output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 7, 7)
    last = model(tokens[:, 7:], mask, out.cache, position_ids=positions[:, 7:]).logits
    alone = model(tokens[:1, 3:]).logits
    torch.testing.assert_close(torch.cat([out.logits, last], 1)[:1, 3:], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"positions": "alibi"}, {"positions": "relative"}, {"window": 4}], ids=str)
@torch.no_grad()
def test_positions_that_columns_cannot_count_are_refused(options):
    model, tokens = tiny.make(layer_types=["attention", "implicit"], **options), tiny.tokens()
    mask, plain = torch.ones_like(tokens), model(tokens).logits
    places = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(model(tokens, mask, position_ids=places).logits, plain)
    mask[0, :3] = 0
    model(tokens, mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    with pytest.raises(ValueError, match="`position_ids` must be each token's place"):
        model(tokens, mask, position_ids=torch.cat([places[:, :4], places[:, 4:] + 6], 1))
    mask = torch.ones_like(tokens)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="`position_ids` must be each token's place"):
        model(tokens, mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))


@torch.no_grad()
def test_positions_without_a_causal_mask():
    model = tiny.make(
        ImplicitAttentionModel, is_causal=False, initializer_range=0.1, layer_types=["implicit", "attention"]
    )
    tokens, mask = tiny.tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(tokens, mask).last_hidden_state
    assert torch.equal(model(tokens, mask, position_ids=places).last_hidden_state, expected)
    with pytest.raises(ValueError, match="`position_ids` must be each token's place"):
        model(tokens, mask, position_ids=2 * places)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.zeros(2, 9)}, "`position_ids` must be an integer tensor"),
        ({"position_ids": torch.arange(8)}, r"`position_ids` must be of shape \(2, 9\)"),
        ({"cache_position": torch.arange(1, 10)}, "`cache_position` must be the slots"),
        ({"is_causal": False}, "`is_causal` must be True, as in the configuration"),
        ({"output_router_logits": True}, "no router"),
        ({"cu_seq_lens_k": torch.tensor([0, 9])}, "`cu_seq_lens_k` must be the same"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "`cu_seq_lens_q` must be None for a batch of 2"),
        ({"seq_idx": torch.zeros(9).long()}, "`seq_idx` must be of shape"),
        ({"cache": ((1, 2),)}, "`cache` must be a transformers Cache"),
        ({"cache": EncoderDecoderCache(DynamicCache(), DynamicCache())}, "`cache` must be a transformers Cache"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny.make()(tiny.tokens(), **given)


def test_what_only_says_what_is_so_is_taken():
    model, tokens = tiny.make(), tiny.tokens()
    more = {"cache_position": torch.arange(9), "is_causal": True, "output_router_logits": False, "max_length_q": 9}
    assert torch.equal(model(tokens, **more).logits, model(tokens).logits)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@torch.no_grad()
def test_a_cache_goes_by_its_old_name():
    model, tokens = tiny.make(), tiny.tokens()
    out = model(tokens[:, :5], past_key_values=DynamicCache(config=model.config))
    assert out.past_key_values is out.cache
    last = model(input_ids=tokens[:, 5:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(last, model(tokens).logits[:, 5:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="`past_key_values` must be None next to `cache`"):
        model(tokens[:, :2], cache=out.cache, past_key_values=model(tokens[:, 3:]).cache)


def test_labels_that_are_shifted_already():
    model, tokens = tiny.make(), tiny.tokens()
    shifted = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    expected = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(tokens, labels=tokens, shift_labels=shifted).loss, expected)


@EVERY_KIND
@torch.no_grad()
def test_masks_of_your_own(options):
    """A mask [B, 1, n, n] that says what padding says gives what padding gives, bool or added."""
    model, tokens = tiny.make(**options), tiny.tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model(tokens, mask).logits[mask.bool()]
    full = (mask[:, None, None, :] * torch.ones(9, 9).tril()).bool()
    added = torch.zeros(full.shape, dtype=torch.float64).masked_fill(~full, torch.finfo(torch.float64).min)
    for given in (full, added):
        torch.testing.assert_close(model(tokens, given).logits[mask.bool()], expected, rtol=0, atol=1e-9)


def test_chosen_hidden_states():
    model, tokens = tiny.make(), tiny.tokens()
    every = model(tokens, output_hidden_states=True).hidden_states
    some = model(tokens, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, True, False]
    assert torch.equal(some[2], every[2])


@torch.no_grad()
def test_early_exit(tmp_path):
    """`num_hidden_layers` is read at each call, and saved as it is."""
    model, tokens = tiny.make(dtype=torch.float32, layer_types=["implicit", "attention"]), tiny.tokens()
    whole = model(tokens, output_hidden_states=True)
    model.config.num_hidden_layers = 1
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 2
    assert out.solver_stats.steps.shape == (1,)
    torch.testing.assert_close(out.hidden_states[1], model.model.norm(whole.hidden_states[1]))
    model.generate(tokens, max_new_tokens=2)
    model.config.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).block_types == ["implicit"]
    model.config.num_hidden_layers = 2
    assert torch.equal(model(tokens).logits, whole.logits)


def test_continuous_batching_is_refused():
    model = tiny.make()
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(NotImplementedError, match=r"no continuous batching.*model\.generate on a padded batch"):
            getattr(model, name)([[1, 2]])


def test_tensor_parallelism_is_refused(tmp_path):
    tiny.make(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`tp_plan` must be None"):
        ImplicitAttentionForCausalLM.from_pretrained(tmp_path, tp_plan="auto")


# --- attn_implementation ---


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"window": 4}, {"positions": "alibi"}, {"positions": "relative"}, {"is_causal": False}],
    ids=str,
)
@torch.no_grad()
def test_implementations_agree(options):
    model, tokens = tiny.make(ImplicitAttentionModel, layer_types=["attention"] * 2, **options), tiny.tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert model.config._attn_implementation == "sdpa"
    expected = model(tokens, mask).last_hidden_state[mask.bool()]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens, mask).last_hidden_state[mask.bool()], expected, rtol=0, atol=1e-9)


def test_implementation_is_chosen_on_loading(tmp_path):
    tiny.make(layer_types=["attention"] * 2, dtype=torch.float32).save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == name


def test_ordinary_blocks_call_a_registered_function():
    calls = []

    def counted(module, *tensors, **options):
        calls.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **options)

    AttentionInterface.register("counted", counted)
    model = tiny.make(layer_types=["attention", "implicit"])
    model.set_attn_implementation("counted")
    model(tiny.tokens())
    assert calls == [0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_implementations_that_nothing_would_use_are_refused():
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        tiny.make(attn_implementation="flash_attention_2", layer_types=["attention"] * 2)
    model = tiny.make(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="`attn_implementation` must be left out for a model of implicit blocks"):
        model(tiny.tokens())
    with pytest.raises(ValueError, match="`output_attentions` must be False"):
        tiny.make(attn_implementation="flex_attention", layer_types=["attention"] * 2)(
            tiny.tokens(), output_attentions=True
        )


# --- heads ---


# A causal model without a mask reads the tokens on the left, as transformers' own models do.
@pytest.mark.parametrize(("is_causal", "left"), [(True, False), (False, True), (False, False)])
@torch.no_grad()
def test_classifier_knows_padding_by_its_token(is_causal, left):
    options = {"is_causal": is_causal, "num_labels": 3, "initializer_range": 0.1, "pad_token_id": 0}
    model = tiny.make(ImplicitAttentionForSequenceClassification, **options)
    tokens = tiny.tokens().clamp_min(1)
    tokens[1, 3] = 0  # inside it is a token like others
    padded = tokens.clone()
    padded[0, slice(0, 4) if left else slice(5, None)] = 0
    alone = model(padded[:1, 4:] if left else padded[:1, :5]).logits
    torch.testing.assert_close(model(padded).logits[:1], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(padded).logits[1:], model(tokens).logits[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [slice(0, 2), slice(7, 9)], ids=["left", "right"])
@torch.no_grad()
def test_classifier_reads_the_last_new_token_whatever_the_size_of_the_cache(hidden):
    model = tiny.make(ImplicitAttentionForSequenceClassification, num_labels=3, initializer_range=0.1)
    tokens, mask = tiny.tokens().clamp_min(1), torch.ones(2, 9, dtype=torch.long)
    mask[0, hidden] = 0
    expected = model(tokens, attention_mask=mask).logits
    cache = StaticCache(config=model.config, max_cache_len=14)
    padded = torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(model(tokens, attention_mask=padded, cache=cache).logits, expected, rtol=0, atol=1e-6)
    cache = StaticCache(config=model.config, max_cache_len=14)
    for part in (slice(0, 4), slice(4, 9)):
        out = model(tokens[:, part], attention_mask=padded, cache=cache)
    torch.testing.assert_close(out.logits[1:], expected[1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_bidirectional_classifier_leaves_padding_out_of_the_mean_with_a_mask_of_four_dimensions():
    options = {"is_causal": False, "num_labels": 3, "initializer_range": 0.1, "pad_token_id": 0}
    model = tiny.make(ImplicitAttentionForSequenceClassification, **options)
    tokens = tiny.tokens().clamp_min(1)
    tokens[0, 6:] = 0
    whole = (tokens != 0)[:, None, None].expand(2, 1, 9, 9)
    states = model.base_model(tokens, attention_mask=whole).last_hidden_state
    expected = model.score(torch.stack([states[0, :6].mean(0), states[1].mean(0)]))
    torch.testing.assert_close(model(tokens, attention_mask=whole).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_tensors_without_numbers_are_not_kept_for_later_calls():
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny.make(positions={"name": "scaled_rope", "parameters": rope})
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(RuntimeError):
        model(tiny.tokens())
    model(tiny.tokens())


@pytest.mark.parametrize("is_causal", [True, False])
def test_token_classifier_labels_every_token(is_causal):
    options = {"is_causal": is_causal, "num_labels": 3, "initializer_range": 0.1}
    model = tiny.make(ImplicitAttentionForTokenClassification, **options)
    tokens, labels = tiny.tokens(), tiny.tokens(seed=1) % 3
    labels[0, :4] = -100
    out = model(tokens, labels=labels)
    assert out.logits.shape == (2, 9, 3)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss.double(), expected)
    out.loss.backward()


@pytest.mark.parametrize("is_causal", [True, False])
def test_question_answering_finds_a_span(is_causal):
    model = tiny.make(ImplicitAttentionForQuestionAnswering, is_causal=is_causal, initializer_range=0.1)
    tokens, first, last = tiny.tokens(), torch.tensor([1, 4]), torch.tensor([3, 8])
    out = model(tokens, start_positions=first, end_positions=last)
    assert out.start_logits.shape == out.end_logits.shape == (2, 9)
    losses = [torch.nn.functional.cross_entropy(*pair) for pair in ((out.start_logits, first), (out.end_logits, last))]
    torch.testing.assert_close(out.loss, sum(losses) / 2)
    out.loss.backward()
