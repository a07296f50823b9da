"""Position encodings: rotary positions on queries and keys, or a bias on the scores."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention.attention.spec import BiasTerm
from implicit_attention.errors import bad_type, bad_value, check_positive


class Positions(nn.Module, ABC):
    """Base of the position encodings. Rows and columns are counted from the same origin."""

    @abstractmethod
    def rotation(self, length: int, like: Tensor, first: int | Tensor = 0) -> Tensor | None:
        """Return the angles by which `rotate` turns queries and keys, None for an encoding without rotation.

        Args:
            length: Number of tokens.
            like: Tensor whose dtype and device the result takes.
            first: Position of the first token, a number, a tensor without dimensions or `[B]`; or the positions of all
                tokens, `[B, length]`.

        Returns:
            Cosines and sines, `[2, length, d / 2]` or `[2, B, 1, length, d / 2]`, or None.
        """

    @abstractmethod
    def bias(self) -> tuple[BiasTerm, Tensor] | None:
        """Return a bias term and its tensor `[1, ...]`, None for an encoding without a bias."""

    def forward(self, like: Tensor) -> tuple[BiasTerm, Tensor] | None:
        """Return `bias()` for use beside a tensor. Layers call the module, so that its hooks have their way.

        Args:
            like: Tensor on whose device, and in whose dtype, what is computed anew is wanted.
        """
        return self.bias()


class Rotary(Positions):
    """Rotary positions: pair (i, i + d/2) of a query or key turns by `position * base^(-2 i / d)`.

    Reference:
        Su et al., "RoFormer", arXiv 2104.09864 (2021).
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        """Make the encoding.

        Args:
            head_dim: Size d of a head, even.
            base: The slowest pair has a period of about `2 pi base` positions.
        """
        super().__init__()
        check_positive("head_dim", head_dim, integer=True)
        check_positive("base", base)
        if head_dim % 2:
            raise bad_value("head_dim", "even for rotary positions", head_dim, "Change embed_dim or num_heads.")
        self.head_dim, self.base = head_dim, base

    def rotation(self, length: int, like: Tensor, first: int | Tensor = 0) -> Tensor:
        """Return cosines and sines, `[2, length, d / 2]` or `[2, B, 1, length, d / 2]`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Angles in float64: at position 10^5 float32 would be off by about 0.01.
        i = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=like.device)
        turns = torch.arange(length, dtype=torch.float64, device=like.device)
        if isinstance(first, Tensor) and first.dim():
            turns = first[:, None].double() if first.dim() == 2 else first[:, None, None] + turns
        else:
            turns = turns + first
        turns = turns[..., None]
        angles = turns * self.base ** (-i / self.head_dim)
        return torch.stack([angles.cos(), angles.sin()]).to(dtype)

    def bias(self) -> None:
        """Return None: scores get no bias."""

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"head_dim={self.head_dim}, base={self.base}"


def rotate(t: Tensor, rotation: Tensor) -> Tensor:
    """Rotate `[..., N, d]` by `rotation` `[2, ..., N, d / 2]`."""
    cos, sin = rotation.unbind(0)
    a, b = t.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(t.dtype)


def rotate_few(t: Tensor, rotation: Tensor) -> Tensor:
    """Do what `rotate` does in fewer operations, without gradients: for a decode step, which is made of small ones."""
    # In place its angles may change; inference tensors do not count that.
    found = _by_halves.__wrapped__(rotation, 0) if rotation.is_inference() else _by_halves(rotation, rotation._version)
    cos, signed_sin = found
    halves = t.view(*t.shape[:-1], 2, -1)
    turned = torch.addcmul(halves * cos, halves.flip(-2), signed_sin).view(t.shape)
    return turned if turned.dtype is t.dtype else turned.to(t.dtype)


@lru_cache(maxsize=4)
def _by_halves(rotation: Tensor, version: int) -> tuple[Tensor, Tensor]:
    """Cosines `[..., 1, d / 2]`, and `-sin` and `sin`, `[..., 2, d / 2]`, kept for layers that share a rotation."""
    cos, sin = rotation.unbind(0)
    return cos[..., None, :], torch.stack([-sin, sin], -2)


def unrotate(t: Tensor, rotation: Tensor) -> Tensor:
    """Undo `rotate`. A rotation's inverse is its transpose, so this also pulls cotangents back."""
    cos, sin = rotation.unbind(0)
    return rotate(t, torch.stack([cos, -sin]))


@dataclass(frozen=True)
class DistanceSlope:
    """A bias term: minus a slope per head times the distance."""

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """`-slope_h |i - j|` for slopes `[1, H]`."""
        return -tensor[..., None, None] * _offsets(rows, cols, tensor.device).abs()

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of the slopes, `[1, H]`."""
        return -(grad * _offsets(rows, cols, tensor.device).abs()).sum((0, 2, 3))[None]


@dataclass(frozen=True)
class OffsetTable:
    """A bias term: a table per head, indexed by offset.

    Attributes:
        max_distance: Larger offsets share the table's last entries.
    """

    max_distance: int

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Look up `i - j`, clipped to the table, in `[1, H, 2 max_distance + 1]`."""
        return tensor[..., self._columns(rows, cols, tensor.device)]

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of the table, `[1, H, 2 max_distance + 1]`."""
        found = torch.zeros_like(tensor, dtype=grad.dtype)
        columns = self._columns(rows, cols, tensor.device).flatten()
        return found.index_add_(-1, columns, grad.sum(0, keepdim=True).flatten(-2))

    def _columns(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        offsets = _offsets(rows, cols, device)
        return offsets.clamp(-self.max_distance, self.max_distance) + self.max_distance


def _offsets(rows: slice, cols: slice, device: torch.device) -> Tensor:
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return i - torch.arange(cols.start, cols.stop, device=device)


class ALiBi(Positions):
    """A fixed penalty on distance, `-m_h |i - j|`, with the geometric slopes of the paper.

    Reference:
        Press, Smith and Lewis, "Train Short, Test Long", arXiv 2108.12409 (2021).
    """

    def __init__(self, num_heads: int) -> None:
        """Make the encoding.

        Args:
            num_heads: Number of heads; each has a slope.
        """
        super().__init__()
        check_positive("num_heads", num_heads, integer=True)
        self.num_heads = num_heads

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled encoding, one of a release that kept its slopes too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        kept = self._buffers.pop("slopes", None)
        if kept is not None:
            self.num_heads = len(kept)

    @property
    def slopes(self) -> Tensor:
        """The slopes, `[H]`, float32: computed, since a buffer that is not saved is lost on the meta device."""
        return self._slopes(torch.device("cpu"))

    def _slopes(self, device: torch.device) -> Tensor:
        # The paper defines slopes for powers of two; others add every second slope of the next power.
        power = 2 ** math.floor(math.log2(self.num_heads))
        h = torch.arange(self.num_heads, dtype=torch.float64, device=device)
        exponents = torch.where(h < power, -8 * (h + 1) / power, -4 * (2 * (h - power) + 1) / power)
        return torch.exp2(exponents).float()

    def rotation(self, length: int, like: Tensor, first: int | Tensor = 0) -> None:
        """Return None: queries and keys stay as they are."""

    def bias(self) -> tuple[BiasTerm, Tensor]:
        """Return the distance penalty and the slopes `[1, H]`."""
        return DistanceSlope(), self.slopes[None]

    def forward(self, like: Tensor) -> tuple[BiasTerm, Tensor]:
        """Return the distance penalty and the slopes `[1, H]`.

        Args:
            like: As in `Positions.forward`.
        """
        return DistanceSlope(), self._slopes(like.device).to(like.dtype)[None]

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"num_heads={self.num_heads}"


class RelativeBias(Positions):
    """A learned bias per head for each offset i - j, clipped to a maximum distance; zero at first.

    Reference:
        Raffel et al., "T5", arXiv 1910.10683 (2020), with one entry per offset in place of buckets.
    """

    def __init__(self, num_heads: int, max_distance: int = 128) -> None:
        """Make the encoding.

        Args:
            num_heads: Number of heads; each has a table.
            max_distance: Larger offsets share the table's last entries.
        """
        super().__init__()
        check_positive("num_heads", num_heads, integer=True)
        check_positive("max_distance", max_distance, integer=True)
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def rotation(self, length: int, like: Tensor, first: int | Tensor = 0) -> None:
        """Return None: queries and keys stay as they are."""

    def bias(self) -> tuple[BiasTerm, Tensor]:
        """Return the look-up and the table `[1, H, 2 max_distance + 1]`."""
        return OffsetTable(self.max_distance), self.table[None]

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"num_heads={self.table.shape[0]}, max_distance={self.max_distance}"


def make_positions(positions: "str | Positions | None", num_heads: int, head_dim: int) -> Positions | None:
    """Return the encoding that a layer's `positions` argument names.

    Args:
        positions: None, "rope", "alibi", "relative", or an encoding.
        num_heads: Heads of the layer.
        head_dim: Size of a head.

    Raises:
        TypeError: If `positions` is neither a name nor an encoding.
        ValueError: If the name is unknown, the encoding is made for another number or size of heads, or head_dim is odd
            for rotary positions.
    """
    if isinstance(positions, Positions) and getattr(positions, "head_dim", head_dim) != head_dim:
        raise bad_value("positions", f"made for heads of size {head_dim}", positions)
    made_for = positions.num_heads if isinstance(positions, ALiBi) else num_heads
    made_for = len(positions.table) if isinstance(positions, RelativeBias) else made_for
    if made_for != num_heads:
        raise bad_value("positions", f"made for num_heads={num_heads}", positions)
    if positions is None or isinstance(positions, Positions):
        return positions
    if not isinstance(positions, str):
        raise bad_type("positions", 'None, "rope", "alibi", "relative" or a Positions object', positions)
    if positions == "rope":
        return Rotary(head_dim)
    if positions == "alibi":
        return ALiBi(num_heads)
    if positions == "relative":
        return RelativeBias(num_heads)
    raise bad_value("positions", 'None, "rope", "alibi" or "relative", or a Positions object', positions)
