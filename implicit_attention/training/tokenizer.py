"""A tokenizer whose tokens are the 256 bytes: token b is byte b, so any file is its own sequence of tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = 256, 257
VOCABULARY = 258


def byte_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte b is token b. Two more tokens, end of text and padding, are never used in training.

    Text that spells a special token, such as "<|end|>", is read as its bytes. Bytes that are not valid UTF-8 decode to
    the replacement character; `bytes(tokens)` returns them exactly.

    Args:
        length: Longest sequence of the model, in bytes.

    Returns:
        The tokenizer, which pads on the left, as generation needs it.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Each byte has a letter: its own code point if that is printable, else the next letter above 255.
    own = {ord(letter): letter for letter in letters if ord(letter) < 256}
    others = iter(letters[len(own) :])
    vocabulary = {own.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=length,
    )
