"""transformers' pipelines: a batch gives what each text gives alone."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from implicit_attention import hf
from tests.hf import tiny

TEXTS = ["w3 w4 [MASK] w6", "w7 [MASK]", "w1 [MASK] w2", "w5 w5 w6 [MASK] w8 w9"]  # more than there are layers


def tokenizer(side="left"):
    words = {f"w{i}": i for i in range(tiny.VOCABULARY - 2)} | {"[UNK]": 48, "[MASK]": 49}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="w0", mask_token="[MASK]", padding_side=side
    )


def made(task, cls, side="left", **options):
    model = tiny.make(cls, dtype=torch.float32, pad_token_id=0, **options)
    return pipeline(task, model=model, tokenizer=tokenizer(side), device="cpu")


def assert_close(found, right):
    """The figures of nested lists and dictionaries, all else the same. `index` counts padding.

    Each figure is that of a solve to 1e-5, so two differ by up to 2e-5.
    """
    if isinstance(found, dict):
        assert found.keys() == right.keys()
        for key in found.keys() - {"index"}:
            assert_close(found[key], right[key])
    elif isinstance(found, list):
        for one, other in zip(found, right, strict=True):
            assert_close(one, other)
    else:
        assert found == (right if isinstance(found, str | int) else pytest.approx(right, abs=2e-5))


def test_generated_text_of_a_batch_is_that_of_each_text():
    pipe = made("text-generation", hf.ImplicitAttentionForCausalLM)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert pipe(TEXTS, batch_size=4, **settings) == [pipe(text, **settings) for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("task", "cls", "causal"),
    [
        ("text-classification", hf.ImplicitAttentionForSequenceClassification, True),
        ("text-classification", hf.ImplicitAttentionForSequenceClassification, False),
        ("token-classification", hf.ImplicitAttentionForTokenClassification, True),
        ("token-classification", hf.ImplicitAttentionForTokenClassification, False),
        ("fill-mask", hf.ImplicitAttentionForMaskedLM, False),
    ],
)
def test_labels_of_a_batch_are_those_of_each_text(task, cls, causal, side):
    pipe = made(task, cls, side, is_causal=causal)
    alone = [pipe(text) for text in TEXTS]
    assert_close(pipe(TEXTS, batch_size=4), [one for (one,) in alone] if task == "text-classification" else alone)


@pytest.mark.parametrize("causal", [True, False])
def test_features_of_a_batch_are_those_of_each_text(causal):
    pipe = made("feature-extraction", hf.ImplicitAttentionModel, "right", is_causal=causal)
    for text, (found,) in zip(TEXTS, pipe(TEXTS, batch_size=4), strict=True):
        assert_close(found[: len(text.split())], pipe(text)[0])
