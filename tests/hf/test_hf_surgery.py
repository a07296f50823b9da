"""Models whose blocks or settings were changed after they were made: right, or refused with a remedy."""

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from implicit_attention import ForwardSubstitution, Rotary
from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM, ImplicitAttentionModel
from implicit_attention.hf.settings import make_positions

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2, "initializer_range": 0.2}


def make(**settings):
    torch.manual_seed(0)
    return ImplicitAttentionForCausalLM(ImplicitAttentionConfig(**SIZES | settings)).eval()


def without_first(model):
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers -= 1
    return model


def test_blocks_that_were_moved_are_refused_where_a_cache_is_used():
    model, ids = without_first(make()), torch.arange(1, 10)[None]
    with pytest.raises(ValueError, match=r"layer_idx.*\[1, 2\].*set `block.layer_idx`"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    for place, block in enumerate(model.model.layers):
        block.layer_idx = place
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("kept", [[0, 2], [0, 1]])
def test_blocks_of_another_kind_than_the_configuration_says_are_refused(kept):
    """Padding would be attended to, and a saved model would come back as another one."""
    model = make(
        block_types=["implicit", "implicit", "attention"] if kept == [0, 2] else ["attention"] + ["implicit"] * 2
    )
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept[::-1]])
    model.config.num_hidden_layers = 2
    ids, mask = torch.randint(1, 31, (1, 9)), torch.tensor([[0] * 3 + [1] * 6])
    with pytest.raises(ValueError, match=r"config.block_types.*as the blocks are"):
        model(ids, mask, use_cache=False)
    model.config.block_types = [
        "implicit" if hasattr(block.attention, "Omega_V") else "attention" for block in model.model.layers
    ]
    padded = model(ids, mask, use_cache=False).logits[0, 3:]
    assert torch.allclose(padded, model(ids[:, 3:], use_cache=False).logits[0], atol=1e-4)


def test_a_configuration_that_was_changed_is_checked_again():
    config = ImplicitAttentionConfig(**SIZES | {"num_hidden_layers": 2})
    config.block_types = ["attention", "implicit"]
    assert ImplicitAttentionForCausalLM(config)(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 31)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"block_types.*of length num_hidden_layers=4"):
        ImplicitAttentionForCausalLM(config)


def test_heads_that_do_not_make_up_a_token_need_a_projection():
    with pytest.raises(ValueError, match=r"out_proj.*8 numbers and not hidden_size=16"):
        ImplicitAttentionConfig(**SIZES, head_dim=4, out_proj=False)


@pytest.mark.parametrize("kinds", [["implicit"] * 2, ["attention", "implicit"]], ids=" ".join)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_cache_goes_on_where_autocast_begins_or_ends(kinds, static, first):
    model, ids = make(num_hidden_layers=2, block_types=kinds), torch.randint(1, 31, (1, 8))
    expected = model(ids, use_cache=False).logits[:, 6:]
    cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        for piece, narrow in ((ids[:, :6], first), (ids[:, 6:], not first)):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                found = model(piece, cache=cache, use_cache=True).logits
    assert cache.get_seq_length() == 8
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16 has three digits


MIXED = {"num_hidden_layers": 2, "block_types": ["attention", "implicit"], "self_query": "input"}
ONE_ANOTHER = {  # the configuration, what is set on every layer, and what the message names
    "window": ({}, {"window": 3}, "window` must be None, as `config.window` says, but got 3"),
    "alibi": ({"positions": None}, {"positions": "alibi"}, "positions` must be None, as .*but got {'name': 'alibi'}"),
    "rope": ({"positions": None}, {"positions": "rope"}, "positions` must be None, as .*but got {'name': 'rope'"),
    "none": ({"positions": "rope"}, {"positions": None}, "positions` must be 'rope', as .*but got None"),
    "listed": ({"positions": ["rope", "alibi"]}, {"positions": "rope"}, r"layers\[1\].attention.positions` must"),
}


def made(name, value):
    return make_positions(value, 2, 8, 64) if name == "positions" else value


def on_layers(model, settings):
    for block in model.model.layers:
        for name, value in settings.items():
            setattr(block.attention, name, made(name, value))


@pytest.mark.parametrize(("options", "changed", "message"), ONE_ANOTHER.values(), ids=ONE_ANOTHER)
@pytest.mark.parametrize("kinds", [["implicit"] * 2, ["attention"] * 2], ids=lambda kinds: kinds[0])
@torch.no_grad()
def test_settings_that_the_model_reads_are_those_of_its_layers(tmp_path, options, changed, message, kinds):
    model, ids = make(**MIXED | {"block_types": kinds} | options), torch.arange(1, 10)[None]
    on_layers(model, changed)
    with pytest.raises(ValueError, match=message):
        model(ids)
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path)
    for name, value in changed.items():
        setattr(model.config, name, value)
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, new(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, new(ids).logits)


@pytest.mark.parametrize("name", ["window", "positions"])
@torch.no_grad()
def test_a_configuration_that_changes_alone_is_refused(name):
    """Ordinary blocks would follow it, and implicit ones not."""
    model = make(**MIXED)
    setattr(model.config, name, {"window": 2, "positions": None}[name])
    with pytest.raises(ValueError, match=rf"layers\[0\].attention.{name}` must be .*type\(model\)\(config\)"):
        model(torch.arange(1, 10)[None])


@torch.no_grad()
def test_a_compiled_step_refuses_a_layer_that_changed():
    model, ids = make(**MIXED | {"block_types": ["implicit"] * 2}), torch.arange(1, 10)[None]
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(ids[:, :7], cache=cache)
    expected = model(ids[:, :8], use_cache=False).logits[:, 7:]
    torch.testing.assert_close(step(ids[:, 7:8], cache=cache).logits, expected)
    on_layers(model, {"window": 3})
    with pytest.raises(Exception, match=r"layers\[0\].attention.window` must be None"):
        step(ids[:, 8:], cache=cache)


SAVED = {
    "self_query": ({}, {"self_query": "output"}),
    "scale": ({}, {"scale": 0.5}),
    "max_gain": ({"is_causal": False, "max_gain": 0.9}, {"max_gain": 0.5}),
    "feedback_norm": ({"values": "feedback"}, {"feedback_norm": False}),
    "positions": ({}, {"positions": {"name": "rope", "base": 100.0}}),
}


@pytest.mark.parametrize(("options", "changed"), SAVED.values(), ids=SAVED)
@torch.no_grad()
def test_settings_that_only_a_file_would_lose_warn_there(tmp_path, options, changed):
    name, value = next(iter(changed.items()))
    ids, shape = torch.arange(1, 10)[None], {"num_hidden_layers": 2}
    torch.manual_seed(0)
    model = ImplicitAttentionModel(ImplicitAttentionConfig(**SIZES | shape | options)).eval()
    for block in model.layers:
        setattr(block.attention, name, made(name, value))
    found = model(ids).last_hidden_state
    with pytest.warns(UserWarning, match=rf"layers\[0\].attention.{name}` must be .*Set `config.{name}`"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists(), "what was trained is not lost"
    setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).last_hidden_state, found)


def test_what_no_file_loses_can_be_changed(tmp_path):
    model = make(**MIXED, dropout=0.1)
    on_layers(model, {"dropout": 0.0})
    model.model.layers[1].attention.adjoint = "phantom"
    model.model.layers[1].attention.solver = ForwardSubstitution(rtol=1e-6)
    model(torch.arange(1, 10)[None])
    model.save_pretrained(tmp_path)


class Turned(Rotary):
    """An encoding that no configuration names."""

    def rotation(self, length, like, first=0):
        return super().rotation(length, like, first).flip(-1)


def test_an_encoding_of_another_class_warns_when_saved(tmp_path):
    model = make(**MIXED)
    model.model.layers[1].attention.positions = Turned(8)
    model(torch.arange(1, 10)[None])
    with pytest.warns(UserWarning, match=r"layers\[1\].attention.positions` must be 'rope'.*No configuration names"):
        model.save_pretrained(tmp_path)
