"""Writing a converted model: all of its directory, or nothing."""

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from implicit_attention.files import whole_directory
from implicit_attention.hf.conversion.architecture import ConversionError

# What tokenizers of transformers write, and their templates; they are copied as they are.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_BESIDE = 1 << 20  # bytes for what is no weight and no tokenizer


def check_out(out: Path, source: Path) -> None:
    """Refuse a directory that exists, whose parent does not, or that is within the trained model's.

    Args:
        out: Where a model is to be written.
        source: Directory of the trained model, or its file.

    Raises:
        FileExistsError: If it exists.
        NotADirectoryError: If its parent does not exist.
        ConversionError: If it is within the trained model's, which is only read.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, "it exists")
    if not out.absolute().parent.is_dir():
        raise NotADirectoryError(errno.ENOENT, "the directory that it belongs to does not exist")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConversionError(f"{out} is within the trained model's directory, which is only read: choose another.")


def check_size(size: str) -> None:
    """Refuse what is no size of a file.

    Args:
        size: Such as "5GB" or "200MB".

    Raises:
        ConversionError: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size, flags=re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConversionError(f"The size of a file must be such as 5GB or 200MB, but is {size!r}.")


def write(model: PreTrainedModel, source: Path, out: Path, max_shard_size: str = "5GB") -> None:
    """Write a model, with the tokenizer of the trained one. Its directory appears when it is complete.

    Args:
        model: The model.
        source: Directory of the trained model, or its file in GGUF format.
        out: Directory that does not exist yet.
        max_shard_size: Of a file of weights.

    Raises:
        OSError: If there is no room, or something cannot be written; nothing is left then.
        ConversionError: If the tokenizer in a GGUF file cannot be read, likewise; or as `check_out` and `check_size`.
    """
    check_out(out, source)
    check_size(max_shard_size)
    out = out.absolute()
    patterns = () if source.suffix == ".gguf" else _TOKENIZER
    tokenizer = [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]
    weights = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    needed = sum(weights.values()) + sum(path.stat().st_size for path in tokenizer) + _BESIDE
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, and the disk has {free / 1e6:.0f} MB left")
    with whole_directory(out) as part:
        try:
            model.save_pretrained(part, max_shard_size=max_shard_size)
        except SafetensorError as error:  # how safetensors reports a full disk, among others
            raise OSError(str(error)) from error
        for path in tokenizer:
            copy = part / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if source.suffix == ".gguf":
            _tokenizer_in(source).save_pretrained(part)


def _tokenizer_in(source: Path) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # of many kinds, the tokenizers' own among them
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(f"The tokenizer in {source} cannot be read: {reason}") from None
    return found
