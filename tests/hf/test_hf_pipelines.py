"""transformers' pipelines: a batch gives what each text gives alone."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from tests.hf import tiny

TEXTS = ["w3 w4 [MASK] w6", "w7 [MASK]"]


def tokenizer():
    words = {f"w{i}": i for i in range(tiny.VOCABULARY - 2)} | {"[UNK]": 48, "[MASK]": 49}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="w0", mask_token="[MASK]", padding_side="left"
    )


def test_generated_text_of_a_batch_is_that_of_each_text():
    model = tiny.make(dtype=torch.float32, pad_token_id=0)
    made = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert made(TEXTS, batch_size=2, **settings) == [made(text, **settings) for text in TEXTS]
