"""The static description of one attention call, and its score bias, evaluated block by block."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22  # scores alive at once in a chunk: 16 MiB in float32
MIN_CHUNK = 32  # rows; fewer would be all overhead


class BiasTerm(Protocol):
    """An additive score bias, **linear** in one tensor whose leading dimension is the batch or 1."""

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return the bias for a block of scores.

        Args:
            tensor: What the term is made from, `[b, ...]` with b either 1 or the batch size.
            rows: Rows (positions on the query side of the attention) of the block.
            cols: Columns (positions on its key side) of the block.

        Returns:
            `[b, h, r, c]`, each of b, h, r either full or 1; `-inf` hides an entry.
        """


@dataclass(frozen=True)
class AttentionSpec:
    """What is known about an attention call before its tensors are seen.

    Attributes:
        scale: Factor on the scores `q . k`.
        is_causal: Row i sees columns j <= i; rows and columns count from the same origin.
        terms: Additive biases, one tensor each, added after the scaling.
        dropout: Probability with which an attention weight is zeroed; the call then needs `seeds`.
        origin: Row and column of the first score, for a block of a larger matrix.
    """

    scale: float
    is_causal: bool = False
    terms: tuple[BiasTerm, ...] = ()
    dropout: float = 0.0
    origin: tuple[int, int] = (0, 0)

    def shifted(self, row: int, col: int) -> "AttentionSpec":
        """Return the call of a block below the diagonal: its rows start at `row`, its columns at `col`."""
        if row < col:
            raise ValueError(f"a block at row {row}, column {col} lies above the diagonal")
        terms = tuple(_Shifted(term, row, col) for term in self.terms)
        return replace(self, is_causal=False, terms=terms, origin=(self.origin[0] + row, self.origin[1] + col))

    def chunks(self, query: Tensor, key: Tensor, *, systems: int | None = None) -> list[tuple[slice, slice]]:
        """Return (rows, columns they see) so that `systems * rows * columns` stays within a budget.

        Args:
            query: `[B, H, N, d]`.
            key: `[B, H, M, d]`.
            systems: How many score matrices are alive at once; B * H unless told.
        """
        batch, heads, n, _ = query.shape
        m = key.shape[-2]
        step = max(MIN_CHUNK, BLOCK_ELEMENTS // max(1, (systems or batch * heads) * m))
        return list(self._chunks(n, m, step))

    def _chunks(self, n: int, m: int, step: int) -> Iterator[tuple[slice, slice]]:
        for start in range(0, n, step):
            stop = min(n, start + step)
            yield slice(start, stop), slice(0, min(m, stop) if self.is_causal else m)

    def bias(self, tensors: tuple[Tensor, ...], rows: slice, cols: slice, like: Tensor) -> Tensor | None:
        """Return the sum of all biases and of the causal mask on a block, None if there is neither.

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
        if self.is_causal and cols.stop - 1 > rows.start:
            hidden = torch.zeros(rows.stop - rows.start, cols.stop - cols.start, dtype=like.dtype, device=like.device)
            hidden.masked_fill_(_later(rows, cols, like.device), -torch.inf)
            total = hidden[None, None] if total is None else total + hidden
        return total

    def keep(self, seeds: Tensor | None, heads: int, rows: slice, cols: slice, like: Tensor) -> Tensor | None:
        """Return the dropout factors of a block, 0 or 1 / (1 - dropout), None without dropout.

        Each factor is a hash of (seed, head, row, column): the same in every iteration of a solve and in
        its backward pass, whatever the chunking, the batch around the sample or the device.

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
    """A bias term seen from a block that starts at (row, col)."""

    term: BiasTerm
    row: int
    col: int

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        return self.term.block(
            tensor,
            slice(rows.start + self.row, rows.stop + self.row),
            slice(cols.start + self.col, cols.stop + self.col),
        )


def _later(rows: slice, cols: slice, device: torch.device) -> Tensor:
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return torch.arange(cols.start, cols.stop, device=device) > i


def _mix(x: Tensor) -> Tensor:
    """One round of splitmix64 (Steele, Lea, Flood 2014); int64 arithmetic wraps as it should."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
