"""Tokens are bytes: exactly, also after the tokenizer was saved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from implicit_attention.training.tokenizer import END, PAD, VOCABULARY, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """What someone else loads, who knows nothing of this package's function."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(st.text())
def test_text_becomes_its_bytes_and_comes_back(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == text


@given(st.binary())
def test_any_bytes_decode_as_python_decodes_them(tokenizer, content):
    assert tokenizer.decode(list(content)) == content.decode(errors="replace")


def test_each_byte_is_a_token_of_its_own_number(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert [tokenizer(chr(i))["input_ids"] for i in range(128)] == [[i] for i in range(128)]
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))


def test_special_tokens_are_not_read_from_text(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, PAD)
    text = f"a{tokenizer.eos_token}b{tokenizer.pad_token}"
    assert bytes(tokenizer(text)["input_ids"]) == text.encode()
    assert tokenizer.decode([97, END, 98, PAD], skip_special_tokens=True) == "ab"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[PAD, PAD, 97], [97, 98, 99]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert tokenizer.model_max_length == 64
