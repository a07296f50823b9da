"""A file in GGUF format is converted as a directory is."""

import sys

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from implicit_attention.hf import ConversionError, convert

WORDS = ["<s>", "</s>", *"abcdefghij", "ab"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ["a b"])


def write(path, merges):
    """Write a tiny Llama with a tokenizer of letters."""
    writer = gguf.GGUFWriter(str(path), "llama")
    numbers = np.random.default_rng(0)
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(WORDS)), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, WORDS),
        (writer.add_token_merges, merges), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}  # fmt: skip
    tensors = {"token_embd": (len(WORDS), 32), "output_norm": (32,)}
    for i in range(2):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
        tensors |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore")
def test_it_is_converted_with_its_tokenizer(file, tmp_path):
    command = ["convert", "--model", str(file), "--layers", "1", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, command, prog_name="implicit-attention")
    assert result.exit_code == 0, result.output
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    source = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokens = tf.AutoTokenizer.from_pretrained(tmp_path / "new")("cabbed", return_tensors="pt")["input_ids"]
    assert tokens.shape[1] > 1
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, source(tokens).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(convert(source)(tokens).logits, source(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path):
    file = write(tmp_path / "odd.gguf", ["a c"])
    command = ["convert", "--model", str(file), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, command, prog_name="implicit-attention")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"implicit-attention convert: The tokenizer in {file} cannot be read: " + last.partition("read: ")[2]
    assert "out of vocabulary" in last
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_without_the_package_it_is_refused(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match="needs the package gguf"):
        convert(file)
