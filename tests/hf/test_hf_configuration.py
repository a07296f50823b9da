"""The configuration: plain JSON there and back, every option reaches the layer, what is wrong is refused."""

import json

import pytest
import torch
from transformers import AutoConfig

from implicit_attention import Anderson, ForwardSubstitution, Implicit, NewtonKrylov, Phantom, Picard, Rotary, Unrolled
from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionModel
from implicit_attention.hf.rotary import ScaledRotary
from tests.hf import tiny

EVERYTHING = {
    "layer_types": ["implicit", "full_attention"],
    "self_query": "input",
    "query_input": True,
    "qk_norm": False,
    "positions": {"name": "rope", "base": 50.0},
    "values": "identity",
    "out_proj": False,
    "bias": True,
    "dropout": 0.25,
    "scale": 0.3,
    "solver": {"name": "forward_substitution", "block": 16, "fallback": {"name": "newton_krylov", "restart": 9}},
    "adjoint": {"name": "implicit", "solver": {"name": "picard", "damping": 0.5, "max_steps": 99}},
    "on_failure": "ignore",
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "eos_token_id": [2, 3],
}


def test_round_trip(tmp_path):
    config = tiny.config(**EVERYTHING)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ImplicitAttentionConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert {name: getattr(loaded, name) for name in EVERYTHING} == EVERYTHING


def test_values_that_read_outputs(tmp_path):
    """The options come back, and so do the weights; a new model starts as one whose values read none."""
    options = {"self_query": "input", "values": "feedback", "feedback_norm": False, "query_input": True,
               "query_output": False, "bias": True}  # fmt: skip
    torch.manual_seed(1)
    model = ImplicitAttentionModel(tiny.config(**options))
    layer = model.layers[1].attention
    assert layer.Omega_Q is None
    assert not layer.Psi_V.weight.any()
    assert not layer.Psi_V.bias.any()
    torch.nn.init.normal_(layer.Psi_V.weight)
    model.save_pretrained(tmp_path)
    loaded = ImplicitAttentionModel.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in options} == options
    assert torch.equal(loaded.layers[1].attention.Psi_V.weight, layer.Psi_V.weight)
    assert loaded.layers[1].attention.settings == layer.settings


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_flags_that_depend_on_causality_are_saved_as_they_are(tmp_path, is_causal, flag):
    tiny.config(is_causal=is_causal, qk_norm=flag, query_input=flag).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.qk_norm, loaded.query_input) == (flag, flag)


def test_every_option_reaches_the_layer():
    layer = ImplicitAttentionModel(tiny.config(**EVERYTHING)).layers[0].attention
    assert (layer.embed_dim, layer.num_heads, layer.is_causal) == (32, 4, True)
    assert (layer.self_query, layer.normalize_over, layer.query_input, layer.qk_norm) == (
        "input",
        "queries",
        True,
        False,
    )
    assert isinstance(layer.positions, Rotary)
    assert layer.positions.base == 50.0
    assert (layer.values, layer.out_proj, layer.dropout, layer.scale) == ("identity", None, 0.25, 0.3)
    assert layer.W_K.bias is not None
    assert layer.solver == ForwardSubstitution(block=16, fallback=NewtonKrylov(restart=9))
    assert layer.adjoint == Implicit(Picard(damping=0.5, max_steps=99))
    assert layer.on_failure == "ignore"


@pytest.mark.parametrize(
    ("solver", "adjoint", "expected"),
    [
        ("auto", "implicit", (ForwardSubstitution(), Implicit())),
        ("anderson", "unrolled", (Anderson(), Unrolled())),
        ({"name": "picard", "rtol": 1e-3}, {"name": "phantom", "steps": 2}, (Picard(rtol=1e-3), Phantom(steps=2))),
        ({"name": "newton_krylov"}, {"name": "implicit", "solver": None}, (NewtonKrylov(), Implicit())),
    ],
)
def test_solver_and_adjoint_settings(solver, adjoint, expected):
    layer = ImplicitAttentionModel(tiny.config(solver=solver, adjoint=adjoint)).layers[0].attention
    assert (layer.solver, layer.adjoint) == expected


def test_layers_share_no_positions():
    layers = ImplicitAttentionModel(tiny.config(positions="relative")).layers
    assert layers[0].attention.positions.table is not layers[1].attention.positions.table


def test_names_of_the_layer_are_understood():
    config = ImplicitAttentionConfig(embed_dim=48, num_heads=6, num_kv_heads=2)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 6, 2)
    assert config.intermediate_size == 128


def test_ordinary_blocks_go_by_both_names():
    assert tiny.config(layer_types=["attention", "implicit"]).layer_types == ["full_attention", "implicit"]
    assert tiny.config(num_hidden_layers=3).layer_types == ["implicit"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_sise": 3}, r"ImplicitAttentionConfig knows, but got `hidden_sise`\. Did you mean `hidden_size`"),
        ({"num_head": 3}, r"Did you mean `num_heads`\? The options are .*num_kv_heads"),
        ({"temperature": 0.5}, "`temperature`"),
        ({"hidden": 3}, r"but got `hidden`\. Did you mean `hidden_size`\?"),
        ({"d_model": 3}, r"but got `d_model`\. Did you mean `hidden_size`\?"),
        ({"layers": 3}, r"but got `layers`\. Did you mean `num_hidden_layers`\?"),
        ({"n_head": 3}, r"but got `n_head`\. Did you mean `num_attention_heads`\?"),
        ({"vocab_size": "50"}, "`vocab_size` must be an integer > 0"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be an integer > 0"),
        ({"qk_norm": 1}, "`qk_norm` must be one of True, False"),
        ({"layer_types": ["implicit", "explicit"]}, "`block_types` must be one of 'implicit'"),
        ({"layer_types": ["implicit", "mamba"]}, r"`block_types` must be one of 'implicit'.*but got 'mamba' \(str\)"),
        ({"block_types": ["implicit", "mamba"]}, r"`block_types` must be one of 'implicit'.*but got 'mamba' \(str\)"),
        ({"layer_types": ["implicit"]}, "`block_types` must be of length num_hidden_layers=2, but got 1 entries"),
        ({"layer_types": "implicit"}, "`block_types` must be a list"),
        ({"window": 3, "is_causal": False}, "`window` must be None unless is_causal=True"),
        ({"window": 0}, "`window` must be an integer > 0"),
        ({"solver": "andersen"}, "`solver` must be one of 'auto', 'anderson'.*Did you mean `anderson`"),
        ({"solver": "newton"}, r"but got 'newton' \(str\)\. Did you mean `newton_krylov`\?$"),
        ({"solver": {"name": "newton"}}, r"but got \{'name': 'newton'\} \(dict\)\. Did you mean `newton_krylov`\?$"),
        ({"solver": {"name": "auto"}}, "'auto' has no settings: write it alone"),
        ({"solver": 3}, "`solver` must be one of 'auto', 'anderson'"),
        ({"solver": {"name": "anderson", "max_step": 3}}, "got `max_step`, .*Did you mean `max_steps`"),
        ({"solver": {"name": "anderson", "tol": 1}}, "`solver` must be made of settings that 'anderson' has, but got "
         r"`tol`, which it has not\. Did you mean `rtol`\? Its settings are `atol`, .*`max_steps`"),
        ({"solver": {"name": "picard", 3: 4}}, r"but got `3`, which it has not\. Its settings are `atol`"),
        ({"solver": {"max_steps": 3}}, "mapping with such a `name`"),
        ({"solver": {"name": "picard", "damping": 2.0}}, r"`damping` must be in \(0, 1\]"),
        ({"adjoint": {"name": "implicit", "solver": "newton"}}, "`adjoint.solver` must be one of 'anderson'"),
        ({"adjoint": "exact"}, r"`adjoint` must be one of 'implicit', 'phantom', 'unr.*but got 'exact' \(str\)\.$"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` must be a number > 0"),
    ],
)  # fmt: skip
def test_bad_config(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny.config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 5}, "`num_attention_heads` must be a divisor of hidden_size=32"),
        ({"self_query": "x"}, "`self_query` must be one of"),
        ({"normalize_over": "x"}, "`normalize_over` must be one of"),
        ({"values": "x"}, "`values` must be one of"),
        ({"positions": "x"}, r"`positions` must be one of 'alibi', 'relative', 'rope'.*but got 'x' \(str\)\.$"),
        ({"positions": {"name": "rope", "bass": 1}}, "settings that 'rope' has, but got `bass`, .*Did you mean `base`"),
        ({"positions": {"name": "alibi", "slope": 1}}, "but got `slope`, which it has not. It has none."),
        ({"positions": "scaled_rope"}, "the settings of 'scaled_rope': .*none for 'parameters'"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\)"),
        ({"scale": 0.0}, "`scale` must be a number > 0"),
        ({"on_failure": "x"}, "`on_failure` must be one of"),
        ({"is_causal": False, "self_query": "input"}, '`self_query` must be "output" unless is_causal=True'),
    ],
)
@pytest.mark.parametrize("kind", ["implicit", "attention"])
def test_bad_layer_option(options, message, kind):
    """An ordinary block refuses what an implicit one does: its options are the same."""
    with pytest.raises((ValueError, TypeError), match=message):
        ImplicitAttentionModel(tiny.config(layer_types=[kind] * 2, **options))


@pytest.mark.parametrize("kind", ["implicit", "attention"])
def test_scaled_rotary_positions_need_the_longest_sequence_once(kind):
    turned = {"name": "scaled_rope", "parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}
    config = tiny.config(layer_types=[kind] * 2, positions=turned, max_position_embeddings=48)
    first = next(m for m in ImplicitAttentionModel(config).modules() if isinstance(m, ScaledRotary))
    assert first.max_position_embeddings == 48
    config.positions = {**turned, "max_position_embeddings": 24}
    first = next(m for m in ImplicitAttentionModel(config).modules() if isinstance(m, ScaledRotary))
    assert first.max_position_embeddings == 24


def test_a_config_changed_for_the_worse_is_not_saved(tmp_path):
    config = tiny.config()
    config.window = -1
    with pytest.raises(ValueError, match="`window`"):
        config.save_pretrained(tmp_path)


def test_unknown_attention_implementation_is_an_error():
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        ImplicitAttentionModel(tiny.config(attn_implementation="flash_attention_2"))


def test_positions_have_weights_only_where_they_should():
    names = dict(ImplicitAttentionModel(tiny.config(positions="alibi")).named_parameters())
    assert not [name for name in names if "positions" in name]
    assert torch.is_tensor(ImplicitAttentionModel(tiny.config(positions="alibi")).layers[0].attention.positions.slopes)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"values": "fedback"}, "`values` must be one of"),
        ({"self_query": "x"}, "`self_query` must be one of"),
        ({"normalize_over": "z"}, "`normalize_over` must be one of"),
        ({"dropout": 2.0}, "`dropout` must be a number in"),
        ({"scale": -1}, "`scale` must be a number > 0"),
        ({"max_gain": 3.0, "is_causal": False}, "`max_gain` must be a number in"),
        ({"max_gain": 0.9}, "`max_gain` must be None with is_causal=True"),
        ({"values": "feedback", "is_causal": False}, '`values` must be "feedback" only with is_causal=True'),
    ],
    ids=lambda given: ", ".join(given) if isinstance(given, dict) else "",
)
def test_the_layers_options_are_checked_with_the_configuration(options, expected):
    with pytest.raises(ValueError, match=expected):
        ImplicitAttentionConfig(hidden_size=16, num_attention_heads=2, **options)


def test_a_layers_option_that_changed_is_checked_before_it_is_saved(tmp_path):
    config = ImplicitAttentionConfig(hidden_size=16, num_attention_heads=2)
    config.values = "fedback"
    with pytest.raises(ValueError, match="`values` must be one of"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
