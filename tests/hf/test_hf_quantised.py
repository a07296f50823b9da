"""Quantised weights: implicit blocks ask a module for its map, so 8 bits and 4 bits work as in other models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.hf import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize(("kind", "most"), [("8 bits", 0.1), ("torchao", 0.1), ("4 bits", 1.0)])
@torch.no_grad()
def test_quantised_weights(tmp_path, kind, most):
    """How far rounding moves random weights: about 0.03 with 8 bits, 0.5 with 4."""
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=kind == "8 bits", load_in_4bit=kind == "4 bits")
    model = tiny.make(dtype=torch.float32, hidden_size=64, layer_types=["attention", "implicit"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    tokens, expected = tiny.tokens(), model(tiny.tokens()).logits
    error = (loaded(tokens).logits - expected).norm() / expected.norm()
    assert 0 < error < most
    assert loaded.generate(tokens, max_new_tokens=3).shape == (2, 12)
