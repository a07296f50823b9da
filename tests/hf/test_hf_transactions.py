"""Caches of models: tokens of all layers or of none, once, with their gradients; adapters and empty batches."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

from implicit_attention.hf import ImplicitAttentionForCausalLM
from implicit_attention.hf.transactions import transactional
from tests.hf import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers, of names that it will change

KINDS = {"implicit": ["implicit"] * 3, "attention": ["attention"] * 3, "mixed": ["implicit", "attention", "implicit"]}


def make(kind, **options):
    return tiny.make(layer_types=KINDS[kind], num_hidden_layers=3, **options)


def caches(model):
    return {"dynamic": DynamicCache(config=model.config), "lazy": DynamicCache(),
            "static": StaticCache(model.config, max_cache_len=12)}  # fmt: skip


def lengths(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


def interrupt(*_):
    raise KeyboardInterrupt


FAULTS = {
    "interrupted-first": lambda model: model.model.layers[0].mlp.register_forward_pre_hook(interrupt),
    "interrupted-last": lambda model: model.model.layers[2].mlp.register_forward_pre_hook(interrupt),
    "interrupted-head": lambda model: model.lm_head.register_forward_pre_hook(interrupt),
    "nan": lambda model: model.model.layers[2].attention.W_K.weight.data.fill_(torch.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("held", ["dynamic", "lazy", "static"])
@pytest.mark.parametrize("filled", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_call_that_raises_leaves_all_layers_as_they_were(kind, filled, held, fault):
    if fault == "nan" and kind == "attention":
        pytest.skip("an ordinary block lets NaN through, as transformers' own do")
    model, tokens = make(kind), tiny.tokens()
    right, cache = model(tokens, use_cache=False).logits, caches(model)[held]
    if filled:
        model(tokens[:, :filled], cache=cache)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = FAULTS[fault](model)
    for count in (1, 3):
        before = lengths(cache)
        with pytest.raises((KeyboardInterrupt, ValueError)):
            model(tokens[:, filled : filled + count], cache=cache)
        assert lengths(cache) == before
    if hasattr(found, "remove"):
        found.remove()
    model.load_state_dict(state)
    out = model(tokens[:, filled:], cache=cache)
    assert set(lengths(cache)) == {9}
    torch.testing.assert_close(out.logits, right[:, filled:], rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_loss_that_cannot_be_computed_leaves_the_cache_too():
    model, tokens = make("mixed"), tiny.tokens()
    cache = model(tokens[:, :4], use_cache=True).cache
    with pytest.raises(ValueError, match="batch_size"):
        model(tokens[:, 4:], cache=cache, labels=tokens)
    assert lengths(cache) == [4] * 3


@torch.no_grad()
def test_a_static_cache_without_room_for_a_call():
    model, tokens = make("mixed"), tiny.tokens(length=12)
    cache = StaticCache(model.config, max_cache_len=9)
    model(tokens[:, :8], cache=cache)
    with pytest.raises(ValueError, match="max_cache_len"):
        model(tokens[:, 8:], cache=cache)
    assert lengths(cache) == [8] * 3
    model(tokens[:, 8:9], cache=cache)


@pytest.mark.parametrize("held", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_in_a_cache_gets_its_gradient(kind, held):
    model, tokens = make(kind), tiny.tokens(length=4)
    found = []
    for split in (True, False):
        prefix = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        new = model.get_input_embeddings()(tokens)
        if split:
            cache = caches(model)[held]
            model(inputs_embeds=prefix, cache=cache)
            logits = model(inputs_embeds=new, cache=cache).logits
        else:
            logits = model(inputs_embeds=torch.cat([prefix, new], 1), use_cache=False).logits[:, 5:]
        found.append(torch.autograd.grad(logits.sin().sum(), [prefix, *model.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert found[0][0].abs().max() > 1e-5


@pytest.mark.parametrize("held", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_inference_mode_is_of_use_outside(kind, held):
    model, tokens = make(kind), tiny.tokens()
    cache = caches(model)[held]
    if held == "static":  # its own tensors are made outside: transformers writes to them in place
        heads, size = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
        cache.early_initialization(2, heads, size, torch.float64, "cpu")
    with torch.inference_mode():
        model(tokens[:, :5], cache=cache)
    out = model(tokens[:, 5:], cache=cache, labels=tokens[:, 5:])
    out.loss.backward()
    torch.testing.assert_close(out.logits, model(tokens, use_cache=False).logits[:, 5:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_is_made_again_is_refused(kind, reentrant):
    model, embedded = make(kind), torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    cache = DynamicCache(config=model.config)
    y = checkpoint(lambda x: model(inputs_embeds=x, cache=cache).logits, embedded, use_reentrant=reentrant)
    with pytest.raises(ValueError, match="`cache` must be None in a call that the backward pass makes again"):
        y.sum().backward()
    assert lengths(cache) == [5] * 3


def test_gradient_checkpointing():
    model, tokens = make("mixed").train(), tiny.tokens()
    model(tokens, labels=tokens).loss.backward()
    right = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="`cache` must be None with gradient checkpointing in training"):
        model(tokens, cache=DynamicCache(config=model.config))
    out = model(tokens, labels=tokens, use_cache=True)
    assert out.cache is None
    out.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zeros(kind):
    model = make(kind, positions="relative", qk_norm=True)
    out = model(tiny.tokens()[:0], use_cache=False)
    out.logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_adapters_are_merged_without_a_change(bias):
    model, tokens = make("mixed", bias=bias), tiny.tokens()
    names = ["Omega_Q", "W_K", "Omega_V"]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, lora_bias=bias)
    adapted = get_peft_model(model, config).to(torch.float64).eval()
    right = adapted(tokens).logits
    cache = adapted(tokens[:, :5], use_cache=True).cache
    decoded = [adapted(tokens[:, i : i + 1], cache=cache).logits for i in range(5, 9)]
    torch.testing.assert_close(torch.cat(decoded, 1), right[:, 5:], rtol=0, atol=1e-8)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(tokens).logits, right, rtol=0, atol=1e-8)


@torch.no_grad()
def test_adapters_by_sample():
    """Refused where Omega_Q has one, else as one call for each."""
    tokens = tiny.tokens()
    for target in ("Omega_Q", "W_K"):
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        model = get_peft_model(make("implicit"), config)
        model.add_adapter("other", config)
        model.to(torch.float64).eval()
        if target == "Omega_Q":
            with pytest.raises(ValueError, match="`adapter_names` must be absent, since `Omega_Q` has an adapter"):
                model(tokens, adapter_names=["default", "other"])
            continue
        found = model(tokens, adapter_names=["default", "other"]).logits
        for i, name in enumerate(("default", "other")):
            model.set_adapter(name)
            torch.testing.assert_close(found[i], model(tokens[i : i + 1]).logits[0], rtol=0, atol=1e-8)


def test_signatures_stay():
    """transformers reads them."""
    assert ImplicitAttentionForCausalLM.forward.__wrapped__ is not None

    class Model(nn.Module):
        @transactional
        def forward(self, x, cache=None):
            """Doc."""
            return x

    assert Model.forward.__doc__ == "Doc."
    assert Model()(3) == 3


@torch.no_grad()
def test_hooks_on_an_attention_layer_act():
    """Blocks call it: with a causal mask, a cache and statistics too."""
    model, tokens = make("implicit"), tiny.tokens()
    layer, plain = model.model.layers[0].attention, model(tokens).logits
    twice = copy.deepcopy(model)
    twice.model.layers[0].attention.out_proj.weight.mul_(2)
    right = twice(tokens)
    handle = layer.register_forward_hook(lambda module, given, out: (2 * out[0], *out[1:]))
    found = model(tokens)
    torch.testing.assert_close(found.logits, right.logits, rtol=0, atol=1e-8)
    assert torch.equal(found.solver_stats.steps, right.solver_stats.steps)
    first = model(tokens[:, :6], use_cache=True)
    last = model(tokens[:, 6:], cache=first.cache).logits
    torch.testing.assert_close(last, right.logits[:, 6:], rtol=0, atol=1e-8)
    handle.remove()
    layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    assert (model(tokens).logits - plain).abs().max() > 1e-3


@torch.no_grad()
def test_maps_are_called_once_for_outputs_and_weights():
    model, calls = make("implicit"), []
    for name in ("W_K", "Omega_V", "Omega_Q", "out_proj"):
        module = model.model.layers[0].attention.get_submodule(name)
        module.register_forward_hook(lambda module, given, out, name=name: calls.append(name))
    model(tiny.tokens(), output_attentions=True, output_gains=True)
    assert sorted(calls) == ["Omega_Q", "Omega_V", "W_K", "out_proj"]
