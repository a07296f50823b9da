"""Generation: with a cache what there is without one, for every kind of block, cache and search."""

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from implicit_attention.decoding import decode
from implicit_attention.hf import (
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForMaskedLM,
    ImplicitAttentionModel,
)
from tests.hf import tiny

TIGHT = {"rtol": 1e-13, "atol": 1e-13}
EXACT = {"solver": {"name": "forward_substitution", **TIGHT}}
MIXED = {"layer_types": ["attention", "implicit"], **EXACT}
KINDS = {
    "implicit": EXACT,
    "ordinary": {"layer_types": ["attention"] * 2},
    "mixed": MIXED,
    "groups": {"num_kv_heads": 2, **MIXED},
    "window": {"window": 4, **MIXED},
    "input-diagonal": {"self_query": "input", "query_input": True, **EXACT},
    "feedback": {"self_query": "input", "values": "feedback", "num_kv_heads": 2, **EXACT},
    "alibi": {"positions": "alibi", **MIXED},
    "relative": {"positions": {"name": "relative", "max_distance": 5}, **MIXED},
    "keys": {"normalize_over": "keys", "query_input": True, "solver": {"name": "anderson", "max_steps": 200, **TIGHT}},
}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def caches(model, length):
    return {
        "dynamic": DynamicCache(config=model.config),
        "lazy": DynamicCache(),
        "static": StaticCache(model.config, max_cache_len=length + 3),
    }


@EVERY_KIND
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_chunks_equal_the_whole(options, kind, padding):
    """Both sides are solved to 1e-13; what a token's error grows by in two layers stays far below 1e-8."""
    model, tokens = tiny.make(ImplicitAttentionModel, **options), tiny.tokens(3, 13)
    mask = torch.ones_like(tokens)
    if padding:
        mask[1, :4], mask[2, :1] = 0, 0
    full = model(tokens, mask if padding else None, output_attentions=True)
    cache, start = caches(model, 13)[kind], 0
    for length in (6, 1, 1, 3, 2):
        stop = start + length
        part = mask[:, :stop] if padding else None
        out = model(tokens[:, start:stop], part, cache, output_attentions=True)
        assert out.cache is cache
        seen = mask[:, start:stop].bool()
        expected = full.last_hidden_state[:, start:stop]
        torch.testing.assert_close(out.last_hidden_state[seen], expected[seen], rtol=0, atol=1e-8)
        for found, weights in zip(out.attentions, full.attentions, strict=True):
            assert found.shape[-1] == (16 if kind == "static" else stop)  # a static cache shows every slot
            assert not found.transpose(1, 2)[seen][..., stop:].any()
            rows = found[..., :stop].transpose(1, 2)[seen]
            torch.testing.assert_close(rows, weights.transpose(1, 2)[:, start:stop, :, :stop][seen], rtol=0, atol=1e-8)
        start = stop
        assert int(cache.get_seq_length()) == stop


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_greedy_generation_needs_no_cache(options, dtype):
    options = options if dtype == torch.float64 else {k: v for k, v in options.items() if k != "solver"}
    model, tokens = tiny.make(dtype=dtype, **options), tiny.tokens(2, 5)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a device, Triton's kernels do not serve the CPU")
def test_triton_kernels_generate_the_same(brisk_interpreter):
    """Prompt by blocks, then token by token, in a cache of fixed size."""
    tokens, settings = tiny.tokens(2, 5), {"max_new_tokens": 4, "do_sample": False}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    solver = {"name": "forward_substitution", "rtol": 1e-9, "atol": 1e-9}
    expected = tiny.make(solver=solver, **sizes).generate(tokens, use_cache=False, **settings)
    model = tiny.make(solver={**solver, "kernel": "triton"}, **sizes)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_256_tokens_with_cache_and_without(dtype):
    model, tokens = tiny.make(dtype=dtype, layer_types=["implicit", "attention"]), tiny.tokens(1, 5)
    found = [model.generate(tokens, max_new_tokens=256, do_sample=False, use_cache=flag) for flag in (True, False)]
    assert found[0].shape == (1, 261)
    assert torch.equal(*found)


@EVERY_KIND
def test_left_padded_batch_is_each_alone(options):
    model = tiny.make(pad_token_id=0, **options)
    prompts = [tiny.tokens(1, length, seed=length) for length in (3, 7, 5)]
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens[i, 7 - prompt.shape[1] :], mask[i, 7 - prompt.shape[1] :] = prompt[0], 1
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(tokens, attention_mask=mask, **settings)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(together.sequences[i, 7:], alone.sequences[0, prompt.shape[1] :])
        logits = torch.stack([step[i] for step in together.logits])
        torch.testing.assert_close(logits, torch.cat(alone.logits), rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [KINDS["implicit"], KINDS["groups"]], ids=["implicit", "groups"])
@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "top_k": 10, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.7, "num_return_sequences": 3},
    ],
    ids=["beams", "beams-two-back", "sampling", "sampling-three-back"],
)
def test_searches_need_no_cache(options, search):
    model, tokens, found = tiny.make(**options), tiny.tokens(2, 5), []
    for settings in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        found.append(model.generate(tokens, max_new_tokens=7, **search, **settings))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sampled_tokens_that_are_looked_up_in_the_prompt():
    """Candidates that are refused are cropped from the cache."""
    model, tokens = tiny.make(), tiny.tokens(1, 6).repeat(1, 3)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens, **settings)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **settings), expected)


def test_streaming():
    class Collected(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, tokens, streamer = tiny.make(), tiny.tokens(1, 5), Collected()
    out = model.generate(tokens, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_generation_stops_at_the_end_of_the_text():
    model, tokens = tiny.make(pad_token_id=0), tiny.tokens(1, 5)
    free = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    stopped = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=free[2])[0, 5:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_generation_from_embeddings():
    model, tokens = tiny.make(), tiny.tokens(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embedded, **settings), model.generate(tokens, **settings)[:, 5:])


@pytest.mark.parametrize("padded", [False, True])
def test_new_tokens_take_the_short_way(padded, monkeypatch):
    """With `self_query="input"` no token is hard."""
    taken = []

    def recorded(layer, inputs, projected):
        out = decode(layer, inputs, projected)
        taken.extend([out] if inputs.x.shape[1] == 1 else [])
        return out

    monkeypatch.setattr("implicit_attention.solving.decode", recorded)
    model, tokens = tiny.make(self_query="input"), tiny.tokens(2, 5)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert len(taken) == 5 * model.config.num_hidden_layers
    assert all(out is not None for out in taken)


def test_bfloat16_decodes():
    model, tokens = tiny.make(dtype=torch.bfloat16, layer_types=["implicit", "attention"]), tiny.tokens(2, 9)
    with torch.no_grad():
        full = model(tokens).logits[:, -1].float()
        cache = model(tokens[:, :8]).cache
        last = model(tokens[:, 8:], cache=cache).logits[:, -1].float()
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (last - full).norm() < 0.05 * full.norm()


def test_outputs_of_generation():
    model, tokens = tiny.make(), tiny.tokens(1, 5)
    out = model.generate(
        tokens, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True, output_logits=True,
    )  # fmt: skip
    assert [len(step) for step in out.attentions] == [2, 2, 2]
    assert out.attentions[2][0].shape == (1, 4, 1, 7)
    assert out.hidden_states[2][0].shape == (1, 1, 32)


def test_a_conversation_goes_on_from_its_cache():
    model, tokens = tiny.make(), tiny.tokens(1, 6)
    cache = DynamicCache(config=model.config)
    first = model.generate(tokens, max_new_tokens=4, do_sample=False, cache=cache)
    more = torch.cat([first, tiny.tokens(1, 3, seed=9)], 1)
    expected = model.generate(more, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(more, max_new_tokens=5, do_sample=False, cache=cache), expected)


def test_what_the_cache_holds():
    """Queries and values of the columns' heads: in size a cache of keys and values."""
    model = tiny.make(num_kv_heads=2)
    with torch.no_grad():
        cache = model(tiny.tokens(2, 5)).cache
    assert len(cache) == 2
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 5, 8)
        assert not layer.keys.requires_grad


def test_when_there_is_a_cache():
    model, tokens = tiny.make(), tiny.tokens()
    assert model(tokens).cache is not None
    assert model(tokens, use_cache=False).cache is None
    assert model.train()(tokens).cache is None
    assert model(tokens, use_cache=True).cache is not None
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model(tokens, use_cache=True).cache is None
    both_ways = tiny.make(ImplicitAttentionModel, is_causal=False, initializer_range=0.1)
    assert both_ways(tokens).cache is None
    with pytest.raises(ValueError, match="`cache` must be None unless is_causal=True, but got DynamicCache"):
        both_ways(tokens, cache=DynamicCache(config=both_ways.config))


def test_mask_covers_what_is_cached():
    model, tokens = tiny.make(), tiny.tokens(2, 6)
    cache = model(tokens[:, :5]).cache
    with pytest.raises(ValueError, match=r"`attention_mask` must be of shape \(2, 6\)"):
        model(tokens[:, 5:], torch.ones(2, 1), cache)


def test_cache_that_forgets_is_refused():
    model, tokens = tiny.make(), tiny.tokens(2, 6)
    cache = Cache(layers=[DynamicSlidingWindowLayer(3) for _ in range(2)])
    model(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="`cache` must be a DynamicCache or a StaticCache of full length"):
        model(tokens[:, 5:], cache=cache)


def test_full_static_cache_is_an_error():
    model, tokens = tiny.make(), tiny.tokens(2, 6)
    cache = StaticCache(model.config, max_cache_len=5)
    model(tokens[:, :5], cache=cache)
    with pytest.raises(ValueError, match="`cache` must be of max_cache_len 6 or more, but got one of 5"):
        model(tokens[:, 5:], cache=cache)


def test_masked_models_do_not_generate():
    assert not ImplicitAttentionForMaskedLM.can_generate()
    assert ImplicitAttentionForCausalLM.can_generate()
