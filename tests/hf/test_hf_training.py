"""Training: gradients with and without checkpointing, adapters, low precision, torch.compile."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf import ImplicitAttentionForCausalLM, ImplicitAttentionForMaskedLM
from tests.hf import tiny

TARGETS = ["Omega_Q", "W_K", "Omega_V", "out_proj"]
MIXED = {"layer_types": ["implicit", "attention"]}


def gradients(model, tokens):
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient():
    model = tiny.make(bias=True, query_input=True, positions="relative", tie_word_embeddings=False, **MIXED)
    found = gradients(model, tiny.tokens())
    for name, parameter in model.named_parameters():
        assert name in found, name
        # A bias on keys (here: on what stands in their place) shifts all scores of a row: softmax does not see it,
        # but the norm makes it matter.
        assert found[name].abs().max() > 0, (name, parameter.shape)


def test_gradient_is_a_difference_quotient():
    model, tokens = (
        tiny.make(**MIXED, solver={"name": "forward_substitution", "rtol": 1e-13, "atol": 1e-13}),
        tiny.tokens(),
    )
    weight = model.model.layers[0].attention.Omega_Q.weight
    direction = torch.randn_like(weight)
    expected = (gradients(model, tokens)["model.layers.0.attention.Omega_Q.weight"] * direction).sum()

    def loss(step):
        with torch.no_grad():
            weight.add_(step * direction)
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            weight.sub_(step * direction)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

    quotient = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert expected.item() == pytest.approx(quotient.item(), rel=1e-4)  # the loss itself is taken in float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_equal_gradients(reentrant, monkeypatch):
    model, tokens = tiny.make(**MIXED).train(), tiny.tokens()
    expected = gradients(model, tokens)
    calls = []
    solve = ImplicitQueryAttention.forward
    monkeypatch.setattr(ImplicitQueryAttention, "forward", lambda *a, **k: calls.append(1) or solve(*a, **k))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, tokens)
    assert len(calls) == 2  # forwards, and once more backwards
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_dropout_is_the_same_when_a_block_is_computed_again():
    tokens = tiny.tokens()
    model = tiny.make(dropout=0.3, **MIXED).train()
    torch.manual_seed(5)
    expected = gradients(model, tokens)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    found = gradients(model, tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


# peft asks transformers for names that it is leaving behind.
PEFT = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def adapted(model):
    return get_peft_model(model, LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM"))


@PEFT
def test_lora_trains_its_adapters_only(tmp_path):
    model, tokens = tiny.make(dtype=torch.float32, bias=True), tiny.tokens()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    before = model(tokens, labels=tokens)
    lora = adapted(model)
    torch.testing.assert_close(lora(tokens).logits, before.logits, rtol=0, atol=1e-5)
    trainable = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(TARGETS) * 2
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = lora(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = lora(tokens, labels=tokens)
    assert after.loss < before.loss
    assert all((lora.get_parameter(name) != 0).any() for name in trainable)
    for name, p in lora.named_parameters():
        if "lora" not in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, frozen[original]), name
    lora.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    with torch.no_grad():
        again = PeftModel.from_pretrained(tiny.make(dtype=torch.float32, bias=True), tmp_path)
        torch.testing.assert_close(again(tokens).logits, after.logits, rtol=0, atol=1e-5)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, after.logits, rtol=0, atol=1e-4)


@PEFT
@pytest.mark.parametrize("target", TARGETS)
def test_each_adapter_counts(target):
    """Above all that on Omega_Q, whose weight the solver takes as it is."""
    model, tokens = tiny.make(bias=True), tiny.tokens()
    before = model(tokens).logits
    lora = adapted(model).eval().double()
    for name, p in lora.named_parameters():
        if "lora_B" in name and target in name:
            torch.nn.init.normal_(p)
    with torch.no_grad():
        out = lora(tokens, output_attentions=True)
        assert (out.logits - before).abs().max() > 1e-2
        merged = lora.merge_and_unload()(tokens, output_attentions=True)
    torch.testing.assert_close(out.logits, merged.logits, rtol=0, atol=1e-7)
    torch.testing.assert_close(out.attentions, merged.attentions, rtol=0, atol=1e-7)


def test_bfloat16_is_near_float32():
    """Within what rounding weights and activations to eight bits can do, measured on the ordinary model."""
    errors = {}
    for kind in ("implicit", "attention"):
        model, tokens = tiny.make(dtype=torch.float32, layer_types=[kind] * 2), tiny.tokens(4, 24)
        exact = model(tokens).logits
        low = model.bfloat16()
        out = low(tokens, labels=tokens)
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in low.parameters())
        errors[kind] = (out.logits.float() - exact).norm() / exact.norm()
    assert errors["implicit"] < 4 * errors["attention"]
    assert errors["implicit"] < 0.1


def test_autocast():
    model, tokens = tiny.make(dtype=torch.float32, **MIXED), tiny.tokens()
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    assert (out.logits.float() - exact).norm() < 0.1 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_training_lowers_the_loss():
    model, tokens = tiny.make(dtype=torch.float32, **MIXED).train(), tiny.tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(model(tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("cls", "options", "fullgraph"),
    [
        (ImplicitAttentionForCausalLM, MIXED, True),
        (ImplicitAttentionForMaskedLM, {"is_causal": False, "initializer_range": 0.1}, False),
    ],
    ids=["causal", "masked"],
)
def test_compiled_is_what_eager_is(cls, options, fullgraph):
    model, tokens = tiny.make(cls, dtype=torch.float32, **options), tiny.tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model(tokens, mask, labels=tokens)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself, about torch's own ways
        # What is ours ends before a compiler's backend; tests/causal/test_operator.py has one with Inductor.
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        out = compiled(tokens, mask, labels=tokens)
        out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-4)
    assert out.solver_stats.steps.shape == expected.solver_stats.steps.shape
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=1e-4, msg=name)
