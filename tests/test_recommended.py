"""One set of recommended settings: everything above the layer has it, and layers made with it train."""

import inspect
import json

import pytest
import torch

from implicit_attention import ImplicitQueryAttention, recommended
from implicit_attention.cli import stages
from implicit_attention.hf import ImplicitAttentionConfig
from implicit_attention.hf.block import implicit_attention
from implicit_attention.tasks import Recall
from implicit_attention.training.model import build
from implicit_attention.training.settings import Settings as RunSettings
from tests.bridge import make_layer

MAKERS = {
    "causal": (ImplicitQueryAttention.for_causal_lm, recommended.CAUSAL_LM),
    "encoder": (ImplicitQueryAttention.for_encoder, recommended.ENCODER),
    "cross": (ImplicitQueryAttention.for_cross_attention, recommended.CROSS_ATTENTION),
}


def settings_of(layer):
    positions = None if layer.positions is None else type(layer.positions).__name__
    return layer.settings, positions


@pytest.mark.parametrize("name", MAKERS)
def test_layers_by_name_settle_and_train(name):
    make, settings = MAKERS[name]
    layer = make(32, 4, on_failure="raise")
    assert settings_of(layer) == settings_of(ImplicitQueryAttention(32, 4, **settings))
    x = torch.randn(3, 40, 32)
    layer(x, *([torch.randn(3, 11, 32)] if name == "cross" else [])).square().sum().backward()
    for parameter, p in layer.named_parameters():
        assert float(p.grad.abs().max()) > 1e-4, parameter


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_recommended_can_be_overridden_and_nothing_else_slips_in(name):
    make, _ = MAKERS[name]
    layer = make(32, 4, out_proj=False, dropout=0.1)
    assert layer.out_proj is None
    assert layer.dropout == 0.1
    with pytest.raises(TypeError, match="quey_input"):
        make(32, 4, quey_input=True)


def test_the_layer_keeps_the_original_map():
    parameters = inspect.signature(ImplicitQueryAttention.__init__).parameters
    defaults = {name: parameters[name].default for name in recommended.CAUSAL_LM | recommended.ENCODER}
    assert defaults == {
        "is_causal": False, "self_query": "output", "qk_norm": False, "positions": None, "out_proj": False,
        "query_input": False, "max_gain": None,
    }  # fmt: skip


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def test_everything_above_the_layer_has_one_set_of_settings():
    decoder = settings_of(ImplicitQueryAttention.for_causal_lm(32, 4))
    assert settings_of(implicit_attention(ImplicitAttentionConfig(**SIZES))) == decoder
    run = RunSettings(embed_dim=32, heads=4, length=16, kernel="torch")
    assert settings_of(build(run).model.layers[0].attention) == decoder
    encoder = settings_of(ImplicitQueryAttention.for_encoder(32, 4))
    assert settings_of(implicit_attention(ImplicitAttentionConfig(**SIZES, is_causal=False))) == encoder
    shown = stages.runners(0, Recall())[stages.IMPLICIT].model.attention
    expected = ImplicitQueryAttention.for_causal_lm(64, 4, positions=None, out_proj=False)
    assert settings_of(shown) == settings_of(expected)


@pytest.mark.parametrize("options", [{"is_causal": False}, {"normalize_over": "keys"}], ids=str)
def test_no_setting_is_without_effect_in_another_model(options):
    config = ImplicitAttentionConfig(**SIZES, **options)
    assert config.self_query == "output"
    implicit_attention(config)  # the layer refuses what has no effect


def test_a_saved_configuration_keeps_its_own(tmp_path):
    """Configurations are saved with all their values, so a new default is one of new models alone."""
    ImplicitAttentionConfig(**SIZES, self_query="output").save_pretrained(tmp_path)
    assert '"self_query": "output"' in (tmp_path / "config.json").read_text()
    assert ImplicitAttentionConfig.from_pretrained(tmp_path).self_query == "output"
    ImplicitAttentionConfig(**SIZES).save_pretrained(tmp_path)
    assert '"self_query": "input"' in (tmp_path / "config.json").read_text()


def test_max_gain_is_for_new_models_without_a_causal_mask(tmp_path):
    assert ImplicitAttentionConfig(**SIZES).max_gain is None
    assert ImplicitAttentionConfig(**SIZES, is_causal=False).max_gain == 0.9
    assert ImplicitAttentionConfig(**SIZES, is_causal=False, normalize_over="keys", query_input=False).max_gain is None
    for value in (None, 0.5):
        ImplicitAttentionConfig(**SIZES, is_causal=False, max_gain=value).save_pretrained(tmp_path)
        assert ImplicitAttentionConfig.from_pretrained(tmp_path).max_gain == value
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["max_gain"]  # by an older release
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert ImplicitAttentionConfig.from_pretrained(tmp_path).max_gain is None
    assert ImplicitAttentionConfig.from_dict(saved).max_gain is None


def test_the_unrecommended_default_still_solves():
    assert bool(make_layer(8, 2).solve(torch.randn(2, 5, 8, dtype=torch.float64)).converged.all())
