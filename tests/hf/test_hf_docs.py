"""The code in docs/transformers.md runs as it stands; its options are all there are."""

import re
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf import ImplicitAttentionConfig

PAGE = Path(__file__).parent.parent.parent / "docs" / "transformers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block):
    exec(compile(block, str(PAGE), "exec"), {"__name__": "__page__"})


def test_every_option_of_the_layer_is_in_the_configuration():
    options = set(signature(ImplicitQueryAttention).parameters) - {"device", "dtype", "unknown"}
    known = {field.name for field in fields(ImplicitAttentionConfig)} | set(ImplicitAttentionConfig.attribute_map)
    assert options <= known


def test_every_option_is_documented():
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(ImplicitAttentionConfig)} - inherited
    assert own == set(re.findall(r"^ {8}(\w+):", ImplicitAttentionConfig.__doc__, flags=re.M))
