"""Saving and loading: bit for bit, safetensors alone, Auto classes, tied and resized embeddings."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf import (
    ImplicitAttentionConfig,
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForMaskedLM,
    ImplicitAttentionForSequenceClassification,
    ImplicitAttentionModel,
)
from tests.hf import tiny

BOTH_WAYS = {"is_causal": False, "initializer_range": 0.1}
MODELS = [
    pytest.param(AutoModel, ImplicitAttentionModel, {}, id="base"),
    pytest.param(AutoModelForCausalLM, ImplicitAttentionForCausalLM, {}, id="causal"),
    pytest.param(AutoModelForMaskedLM, ImplicitAttentionForMaskedLM, BOTH_WAYS, id="masked"),
    pytest.param(
        AutoModelForSequenceClassification, ImplicitAttentionForSequenceClassification, {"num_labels": 3}, id="classes"
    ),
]


def first(out):
    return out[0]


@pytest.mark.parametrize(("auto", "cls", "options"), MODELS)
@pytest.mark.parametrize("positions", ["rope", "relative", "alibi"])
def test_loaded_model_is_bit_equal(tmp_path, auto, cls, options, positions):
    options = options | {"positions": positions, "layer_types": ["implicit", "attention"]}
    model, tokens = tiny.make(cls, torch.float32, **options), tiny.tokens()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(first(loaded(tokens)), first(model(tokens)))


def test_made_from_a_config_by_the_auto_classes():
    assert type(AutoModelForCausalLM.from_config(tiny.config())) is ImplicitAttentionForCausalLM


def test_saved_in_shards(tmp_path):
    model, tokens = tiny.make(dtype=torch.float32), tiny.tokens()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_dtype_is_kept_and_can_be_chosen(tmp_path):
    tiny.make(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_pickled_weights_are_refused(tmp_path):
    model = tiny.make(dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        ImplicitAttentionForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_classifier_made_from_a_language_model(tmp_path):
    model = tiny.make(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert 0.1 < loaded.score.weight.std() < 0.3  # new weights, of the configuration's size
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name))


def test_weights_that_a_checkpoint_lacks_start_as_in_a_new_model(tmp_path):
    model = tiny.make(dtype=torch.float32, positions="relative", layer_types=["implicit", "attention"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.endswith(("temperature", "table", "norm.weight"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ImplicitAttentionForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name.endswith("table"):
            assert (parameter == 0).all()
        if name.endswith(("temperature", "norm.weight")):
            assert (parameter == 1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head(tmp_path, tied):
    model = tiny.make(dtype=torch.float32, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded = ImplicitAttentionForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [tiny.VOCABULARY + 7, tiny.VOCABULARY - 7])
def test_resized_embeddings(tmp_path, tied, size):
    model, tokens = tiny.make(dtype=torch.float32, tie_word_embeddings=tied), tiny.tokens() % (tiny.VOCABULARY - 7)
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(size)
        after = model(tokens).logits
    assert model.config.vocab_size == after.shape[-1] == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = min(size, tiny.VOCABULARY)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model(tokens, labels=tokens).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(ImplicitAttentionForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)


def test_new_weights_have_the_configurations_size():
    model = ImplicitAttentionForCausalLM(tiny.config(hidden_size=64, initializer_range=0.03, bias=True))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert 0.027 < parameter.std() < 0.033, name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert (parameter == 1).all(), name


def test_truncated_weights_are_an_error(tmp_path):
    tiny.make(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensors|incomplete|header|metadata"):
        ImplicitAttentionForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error(tmp_path):
    tiny.make(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"hidden_size": 64}
    path.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="mismatch"):
        ImplicitAttentionForCausalLM.from_pretrained(tmp_path)


def test_generation_settings_are_saved(tmp_path):
    model = tiny.make(dtype=torch.float32, eos_token_id=3, pad_token_id=0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (3, 0)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 3


def test_values_that_begin_to_read_outputs_begin_at_zero(tmp_path):
    """Weights that a checkpoint lacks are drawn, each module by itself."""
    options = {"self_query": "input", "bias": True}
    model, tokens = tiny.make(ImplicitAttentionForCausalLM, torch.float32, **options), tiny.tokens()
    model.save_pretrained(tmp_path)
    config = ImplicitAttentionConfig.from_pretrained(tmp_path, values="feedback")
    loaded = ImplicitAttentionForCausalLM.from_pretrained(tmp_path, config=config)
    drawn = [p for name, p in loaded.named_parameters() if "Psi_V" in name]
    assert drawn
    assert not any(bool(p.any()) for p in drawn)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_reset_leaves_psi_v_at_zero():
    layer = ImplicitQueryAttention(8, 2, is_causal=True, self_query="input", values="feedback", bias=True)
    for parameter in layer.Psi_V.parameters():
        torch.nn.init.ones_(parameter)
    for module in layer.modules():  # as after a start on the meta device
        getattr(module, "reset_parameters", lambda: None)()
    assert not any(bool(p.any()) for p in layer.Psi_V.parameters())
