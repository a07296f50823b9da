"""Writing a converted model: all of its directory, or nothing."""

import errno
import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from implicit_attention.hf.conversion.architecture import ConversionError

# What tokenizers of transformers write, and their templates; they are copied as they are.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_BESIDE = 1 << 20  # bytes for what is no weight and no tokenizer


def check_out(out: Path) -> None:
    """Refuse a directory that exists, or whose parent does not.

    Args:
        out: Where a model is to be written.

    Raises:
        FileExistsError: If it exists.
        NotADirectoryError: If its parent does not exist.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, "it exists")
    if not out.absolute().parent.is_dir():
        raise NotADirectoryError(errno.ENOENT, "the directory that it belongs to does not exist")


def write(model: PreTrainedModel, source: Path, out: Path, max_shard_size: str = "5GB") -> None:
    """Write a model, with the tokenizer of the trained one. Its directory appears when it is complete.

    Args:
        model: The model.
        source: Directory of the trained model, or its file in GGUF format.
        out: Directory that does not exist yet.
        max_shard_size: Of a file of weights.

    Raises:
        OSError: If there is no room, or something cannot be written; nothing is left then.
        ConversionError: If the tokenizer in a GGUF file cannot be read; likewise.
    """
    check_out(out)
    out = out.absolute()
    tokenizer = [] if source.suffix == ".gguf" else [source / name for name in _TOKENIZER if (source / name).is_file()]
    weights = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    needed = sum(weights.values()) + sum(path.stat().st_size for path in tokenizer) + _BESIDE
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, and the disk has {free / 1e6:.0f} MB left")
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    part.mkdir()
    try:
        model.save_pretrained(part, max_shard_size=max_shard_size)
        for path in tokenizer:
            shutil.copyfile(path, part / path.name)
        if source.suffix == ".gguf":
            _tokenizer_in(source).save_pretrained(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tokenizer_in(source: Path) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # of many kinds, the tokenizers' own among them
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(f"The tokenizer in {source} cannot be read: {reason}") from None
    return found
