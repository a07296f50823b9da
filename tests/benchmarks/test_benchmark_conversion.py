"""The benchmark of a converted model, on a tiny one."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import conversion, page


def test_a_model_is_converted_compared_timed_and_told(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    result = conversion.run(model=tmp_path / "model", tokens=32, repeats=2, steps=2)
    assert result["correct"]
    assert result["check"]["equal"] == conversion.PROMPTS
    assert result["conversion"]["peak_mb"] > result["conversion"]["weights_mb"] > 0.0
    text = page.conversion_figures(result)
    assert f"| {result['token']['ratio']:.2f} |" in text
    assert "model, 2 layers" in text
