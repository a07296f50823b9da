"""The static description of an attention call, and its score bias, computed block by block."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Any, ...]  # query, key, value, self score or None, then one tensor per bias term

BLOCK_ELEMENTS = 1 << 22  # scores of a chunk, 16 MiB in float32: more takes more memory, fewer more launches
MIN_CHUNK = 32  # rows of a chunk: with fewer rows the launch overhead dominates


class BiasTerm(Protocol):
    """An additive score bias, **linear** in one tensor. The tensor's leading dimension is the batch size or 1."""

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return the bias for a block of scores.

        Args:
            tensor: Tensor of the term, `[b, ...]` with b either 1 or the batch size.
            rows: Rows (positions on the query side of the attention) of the block.
            cols: Columns (positions on its key side) of the block.

        Returns:
            `[b, h, r, c]`, each of b, h, r either full or 1; `-inf` hides an entry.
        """

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of the tensor for a cotangent of `block`: the transpose of the linear term.

        Args:
            tensor: As in `block`.
            rows: As in `block`.
            cols: As in `block`.
            grad: `[B, H, r, c]`.

        Returns:
            Like `tensor`, in the dtype of `grad`.
        """


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of an attention call, without its tensors.

    Attributes:
        scale: Factor on the scores `q . k`.
        is_causal: Row i sees columns j <= i, counted from `origin`.
        terms: Additive biases, one tensor each, added after the scaling.
        dropout: Probability with which an attention weight is zeroed. The call then needs `seeds`.
        window: Row i sees columns j > i - window; None for all.
        origin: Row and column of the first score, if the call is a block of a larger matrix.
    """

    scale: float
    is_causal: bool = False
    terms: tuple[BiasTerm, ...] = ()
    dropout: float = 0.0
    window: int | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def plain(self) -> bool:
        """Whether the only bias, if any, is a causal mask aligned to the first row and column."""
        return not self.terms and self.window is None and not (self.is_causal and self.ahead)

    @property
    def ahead(self) -> int:
        """The column of the first row's diagonal element."""
        return self.origin[0] - self.origin[1]

    def shifted(self, row: int, col: int) -> "AttentionSpec":
        """Return the call of a block below the diagonal, with rows from `row` on and columns from `col` on."""
        if row < col:
            raise ValueError(f"a block at row {row}, column {col} lies above the diagonal")
        terms = tuple(_Shifted(term, row, col) for term in self.terms)
        return replace(self, is_causal=False, terms=terms, origin=(self.origin[0] + row, self.origin[1] + col))

    def following(self, past: int) -> "AttentionSpec":
        """Return the call whose first row is at column `past`; a cache holds the columns before it."""
        return replace(self.shifted(past, 0), is_causal=self.is_causal) if past else self

    def chunks(self, query: Tensor, key: Tensor, *, systems: int | None = None) -> list[tuple[slice, slice]]:
        """Return pairs (rows, columns that they see) with at most `BLOCK_ELEMENTS` scores each.

        Args:
            query: `[B, H, N, d]`.
            key: `[B, H, M, d]`.
            systems: Number of score matrices in memory at once; B * H if None.
        """
        batch, heads, n, _ = query.shape
        m = key.shape[-2]
        seen = m if self.window is None else min(m, self.window + 2 * MIN_CHUNK)
        step = max(MIN_CHUNK, BLOCK_ELEMENTS // max(1, (systems or batch * heads) * seen))
        return list(self._chunks(n, m, step))

    def _chunks(self, n: int, m: int, step: int) -> Iterator[tuple[slice, slice]]:
        for start in range(0, n, step):
            stop = min(n, start + step)
            first = 0 if self.window is None else min(m - 1, max(0, start + self.ahead - self.window + 1))
            yield slice(start, stop), slice(first, min(m, stop + self.ahead) if self.is_causal else m)

    def bias(self, tensors: tuple[Tensor, ...], rows: slice, cols: slice, like: Tensor) -> Tensor | None:
        """Return the sum of all biases and masks (causal, window) on a block, None without any.

        Args:
            tensors: One tensor per term.
            rows: Rows of the block.
            cols: Columns of the block.
            like: Tensor whose dtype and device the block takes.

        Returns:
            `[b, h, r, c]`, each of b, h, r either full or 1, or None.
        """
        total = None
        for term, tensor in zip(self.terms, tensors, strict=True):
            block = term.block(tensor, rows, cols).to(like.dtype)
            total = block if total is None else total + block
        hidden = self._hidden(rows, cols, like.device)
        if hidden is not None:
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
            total = mask[None, None] if total is None else total + mask
        return total

    def bias_gradient(
        self, tensors: tuple[Tensor, ...], rows: slice, cols: slice, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of each term's tensor for the cotangent `grad` `[B, H, r, c]` of a block's bias.

        Args:
            tensors: One tensor per term.
            rows: Rows of the block.
            cols: Columns of the block.
            grad: Cotangent.

        Returns:
            One gradient per term, in the dtype of `grad`; None for a tensor that is not float.
        """
        found: list[Tensor | None] = []
        for term, tensor in zip(self.terms, tensors, strict=True):
            real = tensor.is_floating_point()
            found.append(term.pull(tensor, rows, cols, grad) if real else None)
        return tuple(found)

    def _hidden(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        """The entries of a block that the causal mask and the window hide, `[r, c]`, None if they hide none."""
        later = self.is_causal and cols.stop - 1 > rows.start + self.ahead
        past = self.window is not None and rows.stop - 1 + self.ahead - cols.start >= self.window
        if not (later or past):
            return None
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.ahead
        distance = i - torch.arange(cols.start, cols.stop, device=device)
        hidden = distance < 0 if later else torch.zeros_like(distance, dtype=torch.bool)
        return hidden | (distance >= self.window) if self.window is not None else hidden

    def keep(self, seeds: Tensor | None, heads: int, rows: slice, cols: slice, like: Tensor) -> Tensor | None:
        """Return the dropout factors of a block, 0 or 1 / (1 - dropout), None without dropout.

        Each factor is a hash of (seed, head, row, column). So it is the same in every iteration of a solve and in the
        backward pass, and does not depend on the chunks, on the other samples or on the device.

        Args:
            seeds: `[B]`, int64.
            heads: Number of heads.
            rows: Rows of the block.
            cols: Columns of the block.
            like: Tensor whose dtype the factors take.

        Returns:
            `[B, H, r, c]` or None.
        """
        if self.dropout == 0.0 or seeds is None:
            return None
        device = seeds.device
        h = torch.arange(heads, device=device)[:, None, None]
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.origin[0]
        j = torch.arange(cols.start, cols.stop, device=device) + self.origin[1]
        bits = _mix(_mix(_mix(seeds[:, None, None, None] + h) + i) + j)
        uniform = (bits & 0xFFFFFF).to(torch.float32) / (1 << 24)
        return (uniform >= self.dropout).to(like.dtype) / (1.0 - self.dropout)


@dataclass(frozen=True)
class _Shifted:
    """A bias term on a block that starts at (row, col)."""

    term: BiasTerm
    row: int
    col: int

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        return self.term.block(tensor, *self._moved(rows, cols))

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        return self.term.pull(tensor, *self._moved(rows, cols), grad)

    def _moved(self, rows: slice, cols: slice) -> tuple[slice, slice]:
        return (
            slice(rows.start + self.row, rows.stop + self.row),
            slice(cols.start + self.col, cols.stop + self.col),
        )


def _mix(x: Tensor) -> Tensor:
    """One round of splitmix64 (Steele, Lea and Flood 2014) in int64, which wraps around like uint64."""
    # int64 shifts keep the sign; the masks clear the bits that an unsigned shift would fill with zeros.
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
