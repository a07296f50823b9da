"""Text as a model's own tokenizer reads it: documents one after another, each of which is read alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from implicit_attention.training.corpus import Corpus, FilePart
from implicit_attention.training.faults import RunError

_TOGETHER = 64  # documents that a tokenizer reads at once
_UNSEEN = -100  # a label that counts for nothing


@dataclass(frozen=True)
class Packed:
    """The tokens of documents, one after another.

    Attributes:
        ids: `[n]`, int32.
        starts: Where each document begins, `[documents]`, int64, increasing from 0.
        bytes_per_token: Mean over the tokens that are predicted.
    """

    ids: Tensor
    starts: Tensor
    bytes_per_token: float

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def window(self, start: int, length: int) -> dict[str, Tensor]:
        """Return some of the tokens as a model is to be given them.

        Args:
            start: The first.
            length: How many, N.

        Returns:
            `input_ids`, `labels` and `position_ids`, `[N]`, int64. Positions count from 0 in each document, which keeps
            documents apart. The first token of a document is to be predicted from nothing, so its label counts for
            nothing.
        """
        ids = self.ids[start : start + length].long()
        place = torch.arange(start, start + length)
        document = torch.searchsorted(self.starts, place, right=True) - 1
        begins = self.starts[document].clamp_min(start)
        labels = ids.masked_fill(place == begins, _UNSEEN)
        return {"input_ids": ids, "labels": labels, "position_ids": place - begins}


def pack(text: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[Packed, Packed]:
    """Read a text with a model's tokenizer. Each document gets the special tokens that the tokenizer adds by itself.

    Args:
        text: The text. Bytes that are not valid UTF-8 are read as the replacement character.
        tokenizer: The tokenizer.
        vocabulary: Number of tokens that the model knows.

    Returns:
        Training text and held-out text.

    Raises:
        RunError: If the tokenizer makes tokens that the model does not know.
    """
    parts = (text.training, text.sizes[0]), (text.held_out, text.sizes[1])
    training, held_out = (_packed(part, sizes, tokenizer) for part, sizes in parts)
    for part in (training, held_out):
        if len(part) and int(part.ids.max()) >= vocabulary:
            raise RunError(
                f"the tokenizer of --from makes token {int(part.ids.max())}, but the model has {vocabulary} tokens"
            )
    return training, held_out


def _packed(text: Tensor | FilePart, sizes: list[int], tokenizer: PreTrainedTokenizerBase) -> Packed:
    found: list[Tensor] = []
    kept: list[int] = []  # bytes of the documents that have tokens
    documents = list(_documents(text, sizes))
    for first in range(0, len(documents), _TOGETHER):
        read = tokenizer(documents[first : first + _TOGETHER], verbose=False)["input_ids"]
        found += [torch.tensor(ids, dtype=torch.int32) for ids in read if ids]
        kept += [size for ids, size in zip(read, sizes[first : first + _TOGETHER], strict=True) if ids]
    lengths = torch.tensor([0, *map(len, found)])
    ids = torch.cat(found) if found else torch.empty(0, dtype=torch.int32)
    return Packed(ids, lengths.cumsum(0)[:-1], _bytes_per_token(found, kept, tokenizer.bos_token_id))


def _bytes_per_token(documents: list[Tensor], sizes: list[int], begin: int | None) -> float:
    """Bytes of a token that is predicted: of all but the first in a document, which has none if it is `begin`."""
    predicted = sum(max(0, len(ids) - 1) for ids in documents)
    covered = sum(
        size if int(ids[0]) == begin else size * (len(ids) - 1) / len(ids)
        for ids, size in zip(documents, sizes, strict=True)
        if len(ids) > 1
    )
    return covered / predicted if predicted else 1.0


def _documents(text: Tensor | FilePart, sizes: list[int]) -> Iterator[str]:
    first = 0
    for size in sizes:
        yield text[first : first + size].numpy().tobytes().decode("utf-8", errors="replace")
        first += size
