"""Windows of a text: at random places to learn from, one after another to be measured on."""

import hashlib

from torch import Tensor
from torch.utils.data import Dataset

from implicit_attention.training.corpus import FilePart
from implicit_attention.training.faults import RunError
from implicit_attention.training.packed import Packed

Text = Tensor | FilePart | Packed  # of bytes, `[n]`, uint8; or of tokens


class Windows(Dataset[dict[str, Tensor]]):
    """Base: windows of a text."""

    text: Text

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a predicted token stands for, in the mean."""
        return self.text.bytes_per_token if isinstance(self.text, Packed) else 1.0


class RandomWindows(Windows):
    """Windows at random places. The i-th depends only on the seed and on i."""

    def __init__(self, text: Text, length: int, *, count: int, seed: int) -> None:
        """Make the data set.

        Args:
            text: At least `length` bytes or tokens.
            length: Bytes or tokens in a window, N.
            count: Number of windows.
            seed: Seed of the places.

        Raises:
            RunError: If the text is shorter than a window.
        """
        _check_length("learn from", text, length)
        self.text, self.length, self.count, self.seed = text, length, count, seed

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a window: `input_ids` and `labels`, both `[N]`, int64; of packed tokens `position_ids` too."""
        digest = hashlib.blake2b(f"{self.seed}:{index}".encode(), digest_size=8).digest()
        return _item(self.text, int.from_bytes(digest, "little") % (len(self.text) - self.length + 1), self.length)


class HeldOutWindows(Windows):
    """Consecutive windows that overlap by one, so that no byte or token is predicted twice.

    Without `limit`, all are predicted but the first and, at the end, the at most N - 2 that fill no window.
    """

    def __init__(self, text: Text, length: int, *, limit: int) -> None:
        """Make the data set.

        Args:
            text: At least `length` bytes or tokens.
            length: Bytes or tokens in a window, N.
            limit: Most windows to use. If there are more, windows at even distances are used.

        Raises:
            RunError: If the text is shorter than a window.
        """
        _check_length("hold out", text, length)
        self.text, self.length = text, length
        available = (len(text) - 1) // (length - 1)
        count = min(available, limit)
        self.starts = [i * available // count * (length - 1) for i in range(count)]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a window: `input_ids` and `labels`, both `[N]`, int64; of packed tokens `position_ids` too."""
        return _item(self.text, self.starts[index], self.length)


def _item(text: Text, start: int, length: int) -> dict[str, Tensor]:
    if isinstance(text, Packed):
        return text.window(start, length)
    window = text[start : start + length].long()
    return {"input_ids": window, "labels": window}


def _check_length(purpose: str, text: Text, length: int) -> None:
    if len(text) < length:
        unit = "tokens" if isinstance(text, Packed) else "bytes"
        raise RunError(
            f"--data has too little text: {len(text)} {unit} to {purpose}, but a sequence has {length}: "
            "give it more text, or shorten the sequences with --length"
        )
