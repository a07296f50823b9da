"""Conversion: the same weights, the same outputs, for every architecture; what cannot be converted is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf import (
    ConversionError,
    ImplicitAttentionConfig,
    ImplicitAttentionForCausalLM,
    ImplicitAttentionModel,
    convert,
)
from implicit_attention.hf.conversion.architecture import chosen_layers
from implicit_attention.hf.settings import make_solver

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **parameters}}


YARN = rope("yarn", original_max_position_embeddings=8)
LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
ARCHITECTURES = {
    "llama": (tf.LlamaConfig, {}),
    "llama-biases": (tf.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": (tf.LlamaConfig, rope("linear")),
    "llama-dynamic": (tf.LlamaConfig, {**rope("dynamic"), "max_position_embeddings": 8}),
    "llama-llama3": (tf.LlamaConfig, LLAMA3),
    "llama-yarn": (tf.LlamaConfig, YARN),
    "mistral-window": (tf.MistralConfig, {"sliding_window": 5, "head_dim": 10}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 12}),
    "smollm3": (tf.SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "granite": (
        tf.GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
}
LAYERS = {"all": "all", "one": [1]}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


class Turning(nn.Module):
    """A model's rotary positions, without the rounding of cosines to float32."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs = theirs

    def forward(self, x, position_ids):
        self.theirs(x, position_ids)  # "dynamic" changes its frequencies here
        angles = (position_ids[..., None].float() * self.theirs.inv_freq.float()).to(x.dtype)
        factor, angles = self.theirs.attention_scaling, torch.cat([angles, angles], -1)
        return angles.cos() * factor, angles.sin() * factor


def trained(name, dtype=torch.float64, auto=tf.AutoModelForCausalLM, **options):
    """A model with random weights, norms and biases too, whose norms and rotations do not round to float32."""
    cls, more = ARCHITECTURES[name]
    torch.manual_seed(2)
    model = auto.from_config(cls(**{**SIZES, **more, **options}), attn_implementation="sdpa").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=dtype)
                norm.weight = child.weight
                setattr(module, child_name, norm)
    model.base_model.rotary_emb = Turning(model.base_model.rotary_emb)
    return model


def tokens(length=24):
    return torch.randint(1, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(5))


def padded():
    ids, mask = tokens(), torch.ones(2, 24, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    return ids, mask


def off(found, expected, where=...):
    return float((found - expected)[where].abs().max() / expected[where].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_those_of_the_trained_model(name, dtype):
    source = trained(name, dtype)
    ids, mask = padded()
    expected = source(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    for layers in LAYERS.values():
        for self_query in ("input", "output"):
            model = convert(source, layers, self_query=self_query, on_failure="raise")
            given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
            assert off(model(ids, **given).logits, expected, mask > 0) < TOLERANCES[dtype]


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_with_a_cache(name, layers):
    source = trained(name)
    expected = step_by_step(source)  # first: "dynamic" frequencies remember the longest call, such as convert's
    assert off(step_by_step(convert(source, layers, on_failure="raise")), expected) < 1e-10


def step_by_step(model):
    cache, ids, found = tf.DynamicCache(config=model.config), tokens(), []
    for part in (ids[:, :14], ids[:, 14:17], *ids[:, 17:].split(1, 1)):
        found.append(model(part, cache=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window", "qwen3", "smollm3"])
@torch.no_grad()
def test_greedy_generation_goes_on_alike_and_survives_saving(name, tmp_path):
    source = trained(name, max_position_embeddings=128)
    model = convert(source, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ImplicitAttentionForCausalLM
    assert loaded.dtype is torch.float64
    ids, mask = padded()
    given = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False}
    expected = source.generate(ids, **given)
    assert expected.shape == (2, 24 + 64)
    assert torch.equal(loaded.generate(ids, **given), expected)
    given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    del given["max_new_tokens"], given["do_sample"]
    assert torch.equal(loaded(ids, **given).logits, model(ids, **given).logits)


def test_the_other_heads():
    model = convert(trained("llama", auto=tf.AutoModel))
    assert type(model) is ImplicitAttentionModel
    source = trained("qwen2", auto=tf.AutoModelForSequenceClassification, num_labels=5)
    ids, mask = padded()
    with torch.no_grad():
        found, expected = (m(ids.flip(1), attention_mask=mask.flip(1)).logits for m in (convert(source), source))
    assert found.shape == (2, 5)
    assert off(found, expected) < 1e-10


def test_a_converted_model_learns_and_the_source_stays():
    source = trained("qwen3")
    before = {name: t.clone() for name, t in source.state_dict().items()}
    model = convert(source, on_failure="raise").train()
    ids = tokens()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        assert model.model.layers[1].attention.Omega_Q.weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(torch.equal(t, before[name]) for name, t in source.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turn only a part of each head"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "of type 'proportional'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "The weights are quantised"),
    ],
)
def test_what_cannot_be_converted_is_refused(options, message):
    source = trained("llama")
    for name, value in options.items():
        setattr(source.config, name, value)
    with pytest.raises(ConversionError, match=message):
        convert(source)


IGNORED = {
    "llama-window": (tf.LlamaConfig, {"sliding_window": 5}),
    "granite-window": (tf.GraniteConfig, {"sliding_window": 5}),
    "mistral-types": (tf.MistralConfig, {"sliding_window": 5, "layer_types": ["full_attention"] * 3}),
    "mistral-biases": (tf.MistralConfig, {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),
    "qwen2-biases": (tf.Qwen2Config, {"mlp_bias": True, "attention_bias": True}),
    "qwen3-biases": (tf.Qwen3Config, {"mlp_bias": True}),
    "llama-multipliers": (tf.LlamaConfig, {"embedding_multiplier": 3.0, "attention_multiplier": 0.1}),
}


@pytest.mark.parametrize(("kind", "options"), IGNORED.values(), ids=IGNORED)
@torch.no_grad()
def test_fields_that_the_trained_model_does_not_read_are_not_read(kind, options):
    torch.manual_seed(0)
    source = tf.AutoModelForCausalLM.from_config(kind(**SIZES, **options)).eval()
    assert off(convert(source)(tokens()).logits, source(tokens()).logits) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("real", [6, 20])
@torch.no_grad()
def test_padding_does_not_count_in_dynamic_positions(real, use_cache):
    source = trained("llama-dynamic", max_position_embeddings=16)
    ids, mask = tokens(), torch.ones(2, 24, dtype=torch.long)
    ids[:, : 24 - real], mask[:, : 24 - real] = 0, 0
    ids[0, 23 - real], mask[0, 23 - real] = 7, 1
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    expected = source.generate(ids, **given)  # first: its frequencies remember the longest call, such as convert's
    found = convert(source).generate(ids, **given)
    assert torch.equal(found.sequences, expected.sequences)
    assert off(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-8


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ends", ["right", "left", "inside"])
@torch.no_grad()
def test_classifiers_read_the_token_that_the_trained_one_reads(ends, masked):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**SIZES, "pad_token_id": 7}, num_labels=3)
    source = tf.LlamaForSequenceClassification(config).eval()
    ids = tokens().masked_fill(tokens() == 7, 8)
    ids[1, {"right": slice(20, None), "left": slice(0, 4), "inside": slice(23, None)}[ends]] = 7
    given = {"attention_mask": torch.ones_like(ids)} if masked else {}  # a text may end in the padding's token
    assert off(convert(source)(ids, **given).logits, source(ids, **given).logits) < 1e-5


@torch.no_grad()
def test_a_classifier_without_padding_is_converted():
    config = tf.LlamaConfig(**{**SIZES, "pad_token_id": None}, num_labels=3)
    source = tf.LlamaForSequenceClassification(config).eval()
    assert off(convert(source)(tokens()[:1]).logits, source(tokens()[:1]).logits) < 1e-5


def test_the_source_stays_as_it_is():
    source = trained("llama")
    source.train()
    source.model.layers[1].eval()
    modes = [module.training for module in source.modules()]
    model = convert(source)
    assert [module.training for module in source.modules()] == modes
    model.generation_config.max_new_tokens = 3
    assert source.generation_config.max_new_tokens != 3


def test_a_model_that_was_converted_in_inference_mode_learns():
    with torch.inference_mode():
        model = convert(trained("llama", torch.float32))
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].attention.Omega_Q.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_what_is_no_model_is_refused_with_a_remedy():
    peft = pytest.importorskip("peft")
    source = trained("llama", torch.float32)
    compiled = torch.compile(source, backend="eager")
    for given, message in ((compiled, "convert its _orig_mod"), (nn.Linear(2, 2), "a Linear"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=message):
            convert(given)
    with pytest.raises(ConversionError, match="`dtype` is for models in directories"):
        convert(source, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated it
        packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(source), {torch.nn.Linear})
    with pytest.raises(ConversionError, match="The weights are quantised"):
        convert(packed)
    with pytest.raises(ConversionError, match=r"no weights yet.*load them first"):
        convert(copy.deepcopy(source).to("meta"))
    with pytest.raises(ConversionError, match="LlamaForQuestionAnswering cannot be converted"):
        convert(tf.LlamaForQuestionAnswering(tf.LlamaConfig(**SIZES)))
    adapted = peft.get_peft_model(source, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"merge_and_unload\(\)"):
        convert(adapted)
    with pytest.raises(ConversionError, match=r"It has adapters .*merge_and_unload\(\)"):
        convert(source)
    assert isinstance(convert(adapted.merge_and_unload()), ImplicitAttentionForCausalLM)


def test_other_models_are_refused():
    with pytest.raises(ConversionError, match="Models of type 'gpt2' cannot be converted"):
        convert(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
    with pytest.raises(ConversionError, match="several kinds"):
        convert(trained("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1))
    with pytest.raises(ConversionError, match="norms of queries and keys have eps"):
        convert(trained("qwen3", rms_norm_eps=0.1))
    with pytest.raises(ConversionError, match="A LlamaForTokenClassification cannot be converted"):
        convert(trained("llama", auto=tf.AutoModelForTokenClassification))


def test_a_difference_above_tolerance_is_an_error():
    source = trained("llama")
    source.lm_head.register_forward_hook(lambda module, args, out: out * 1.001)
    with pytest.raises(ConversionError, match="The model is not converted"):
        convert(source)
    convert(source, tolerance=0.01)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_that_read_outputs_begin_at_zero_and_learn(dtype):
    source = trained("llama", dtype)
    model = convert(source, layers=[0, 2], values="feedback")
    ids = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    assert off(model(ids).logits.detach(), source(ids).logits.detach()) < TOLERANCES[dtype]
    model(ids, labels=ids).loss.backward()
    grads = [block.attention.Psi_V.weight.grad for block in model.model.layers if hasattr(block.attention, "Psi_V")]
    assert len(grads) == 2
    assert all(grad.abs().max() > 0 for grad in grads)
    for options in ({"values": "feedback", "self_query": "output"}, {"values": "identity"}):
        with pytest.raises(ConversionError, match="`values"):
            convert(source, **options)


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
@pytest.mark.parametrize("norm", [True, False, "weights"])
@torch.no_grad()
def test_ordinary_blocks_of_this_library_are_converted(layers, norm, tmp_path):
    torch.manual_seed(0)
    config = ImplicitAttentionConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        block_types=["attention"] * 2, qk_norm=norm, initializer_range=0.2, bias=True,
    )  # fmt: skip
    source = ImplicitAttentionForCausalLM(config).double().eval()
    for block in source.model.layers:
        for factors in (block.attention.temperature, block.attention.query_norm, block.attention.key_norm):
            if factors is not None:
                factors.uniform_(0.5, 2.0)
    source.save_pretrained(tmp_path)
    ids = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    for given in (source, tmp_path):
        model = convert(given, layers=layers)
        assert sum(isinstance(b.attention, ImplicitQueryAttention) for b in model.model.layers) == len(
            chosen_layers(layers, 2)
        )
        assert off(model(ids).logits, source(ids).logits) < 1e-10
    with pytest.raises(ConversionError, match="has implicit layers already"):
        convert(model)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("none", []),
        ("1-3", [1, 2, 3]),
        ("4, 0-1", [0, 1, 4]),
        (2, [2]),
        ([-1, 0], [0, 4]),
        (slice(1, None, 2), [1, 3]),
        (np.int64(1), [1]),
        (np.array([1, 3]), [1, 3]),
        (torch.tensor([0]), [0]),
        (range(2), [0, 1]),
    ],
)
def test_layers(layers, expected):
    assert chosen_layers(layers, 5) == expected


@pytest.mark.parametrize("layers", ["3-1", "first", "5", [7], [1.0], "1-", None, 1.5, True, np.int64(5)])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(ConversionError, match=r"`layers`( must be|: the model has layers 0 to 4)"):
        chosen_layers(layers, 5)


@pytest.mark.parametrize("self_query", ["input", "output"])
def test_norms_with_weights_reach_gradients_alike(self_query):
    """The kernels, torch and a solver that knows nothing of rows; a weight of zero too."""
    found = []
    for kernel in ("cpp", "torch", None):
        torch.manual_seed(1)
        solver = (
            {"name": "forward_substitution", "kernel": kernel} if kernel else {"name": "anderson", "max_steps": 200}
        )
        layer = ImplicitQueryAttention(
            24, 4, num_kv_heads=2, head_dim=10, is_causal=True, self_query=self_query,
            query_input=True, qk_norm="weights", positions="rope",
            out_proj=True, bias="qkv", solver=make_solver({**solver, "rtol": 1e-11, "atol": 1e-11}),
            dtype=torch.float64,
        )  # fmt: skip
        assert (layer.W_K.out_features, layer.W_Q.out_features, layer.out_proj.bias) == (40, 20, None)
        with torch.no_grad():
            layer.key_norm.uniform_(0.3, 2.0)
            layer.query_norm.uniform_(0.2, 2.0)[3] = 0.0
        x = torch.randn(2, 40, 24, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for others in found[1:]:
        assert max(off(a, b) for a, b in zip(others, found[0], strict=True)) < 1e-9
