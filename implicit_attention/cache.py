"""Decoding: what a causal layer remembers of the tokens it has seen. A cache of keys and values in size and in use."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from implicit_attention.errors import Came, bad_value, check_positive


class Past(NamedTuple):
    """The columns before the new tokens.

    Attributes:
        column: Their side of the scores, `[B, G, P, d]`, normed and rotated: the queries `phi(y_j)` made from their
            equilibria, or their keys with `normalize_over="keys"`.
        value: Their values, `[B, G, P, d]`.
        hidden: Columns that no row sees (padding), `[B, P]`, True = hidden; None if all are seen.
        position: Position of the first new token: a number, a tensor without dimensions, or `[B]` where samples differ;
            or of every new token, `[B, n]`.
    """

    column: Tensor
    value: Tensor
    hidden: Tensor | None
    position: int | Tensor


class Cache(Protocol):
    """What a layer needs of a cache."""

    def past(self) -> Past | None:
        """Return the columns so far, or none with the position that the next token has; None if that is 0."""

    def append(self, column: Tensor, value: Tensor, hidden: Tensor | None) -> None:
        """Take the columns of new tokens.

        Args:
            column: `[B, G, n, d]`.
            value: `[B, G, n, d]`.
            hidden: `[B, n]`, True = padding; None if there is none.
        """


class DecodeCache:
    """Equilibria of past tokens, preallocated: `y = layer(x_new, cache=cache)` continues where the last call ended.

    Equilibria of past tokens never change, so any split of a sequence into calls gives what one call gives, gradients
    included: what is added while autograd is on keeps its graph, until `detach` or `reset`. So decode under
    `torch.no_grad()`, and `detach` between the steps of truncated backpropagation through time.

    A call that raises leaves the cache as it was.

    Samples may have different lengths. Padding at the end of a sample's new tokens (`key_padding_mask`) is
    forgotten: its next token follows its last real one. Inside, samples then end at the same slot, and begin later.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate an empty cache; `layer.make_cache(batch_size, capacity)` knows the other arguments.

        Args:
            batch_size: B.
            num_heads: Heads of the layer's values, G.
            head_dim: d.
            capacity: Tokens it can hold.
            device: Of the layer.
            dtype: Of the layer.

        Raises:
            TypeError: If a size is no integer.
            ValueError: If it is not positive.
        """
        sizes = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim, "capacity": capacity}
        for name, size in sizes.items():
            check_positive(name, size, integer=True)
        shape = (batch_size, num_heads, capacity, head_dim)
        with _for_any_mode():
            self.column = torch.zeros(shape, device=device, dtype=dtype)
            self.value = torch.zeros_like(self.column)
        self.hidden: Tensor | None = None
        self.shift: Tensor | None = None  # [B], slots that a sample was moved towards the end
        self.used = 0
        self._kept = False  # whether a graph may keep columns and values
        self._live: tuple[Tensor, Tensor] | None = None  # the first slots with their graph, [B, G, n, d] each

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache that goes on by itself; the graph of what it holds is the same, as a graph has no copy."""
        copied = self.__class__.__new__(self.__class__)
        with _for_any_mode():
            copied.__dict__ = {name: deepcopy(held, memo) for name, held in vars(self).items() if name != "_live"}
        copied._live = self._live
        return copied

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.column.shape[2]

    @property
    def lengths(self) -> Tensor:
        """Tokens held per sample, padding not counted, `[B]`."""
        held = torch.full((len(self.column),), self.used, device=self.column.device)
        return held if self.hidden is None else held - self.hidden[:, : self.used].sum(-1)

    def past(self) -> Past | None:
        """Return the columns so far, None if there are none."""
        if self.used == 0:
            return None
        hidden = None if self.hidden is None else self.hidden[:, : self.used]
        position = self.used if self.shift is None else self.used - self.shift
        self._kept = self._kept or torch.is_grad_enabled()
        column, value = self._held()
        return Past(column, value, hidden, position)

    def _held(self) -> tuple[Tensor, Tensor]:
        """All columns and values so far, with their graph where autograd is on."""
        held = slice(0, self.used)
        # .data: a graph that keeps these columns is not disturbed by new ones written behind them.
        stored = self.column.data[:, :, held], self.value.data[:, :, held]
        if self._live is None or not torch.is_grad_enabled():
            return stored
        length = self._live[0].shape[2]
        return _joined(self._live, (stored[0][:, :, length:], stored[1][:, :, length:]))

    def append(self, column: Tensor, value: Tensor, hidden: Tensor | None) -> None:
        """Take the columns of new tokens.

        Args:
            column: `[B, G, n, d]`.
            value: `[B, G, n, d]`.
            hidden: `[B, n]`, True = padding; None if there is none.

        Raises:
            ValueError: If they do not fit; the cache is as before then.
        """
        self.check(column)
        before = (self.column, self.value, self.hidden, self.shift, self.used, self._live)
        try:
            self._append(column, value, hidden)
        except BaseException:  # an interrupt too
            self.column, self.value, self.hidden, self.shift, self.used, self._live = before
            raise

    def _append(self, column: Tensor, value: Tensor, hidden: Tensor | None) -> None:
        new = slice(self.used, self.used + column.shape[2])
        live = self._live
        if torch.is_grad_enabled() and (column.requires_grad or value.requires_grad):
            live = _joined(self._held(), (column.to(self.column.dtype), value.to(self.value.dtype)))
        with _for_any_mode():
            self.column[:, :, new], self.value[:, :, new] = column.detach(), value.detach()
            if self.hidden is None and hidden is not None and bool(hidden.any()):
                shape = (len(self.column), self.capacity)
                self.hidden = torch.zeros(shape, dtype=torch.bool, device=self.column.device)
            self._hide(new, hidden)
        self._live, self.used = live, new.stop
        if hidden is not None:
            self._forget_trailing(hidden)

    def _hide(self, new: slice, hidden: Tensor | None) -> None:
        """Say which new slots hold padding; a call that was interrupted may have said otherwise."""
        if self.hidden is not None:
            with _for_any_mode():
                self.hidden[:, new] = False if hidden is None else hidden

    def ahead(self, count: int) -> tuple[Tensor, Tensor]:
        """Return where the next tokens belong, for them to be filled in and then taken (`advance`).

        Args:
            count: How many; `check` says whether they fit.

        Returns:
            Their columns and values, `[B, G, count, d]` each.
        """
        new = slice(self.used, self.used + count)
        return self.column.data[:, :, new], self.value.data[:, :, new]

    def advance(self, count: int) -> None:
        """Take tokens that have been filled in, none of them padding.

        Args:
            count: How many.
        """
        self._hide(slice(self.used, self.used + count), None)
        self.used += count

    def check(self, new: Tensor) -> None:
        """Refuse new columns `[B, G, n, d]` that do not fit.

        Args:
            new: The columns.

        Raises:
            ValueError: If batch, heads, head size, device or (without autocast) dtype differ, or the cache would
                overflow.
        """
        held = self.column
        for name, i in (("batch size", 0), ("number of value heads", 1), ("head size", 3)):
            if new.shape[i] != held.shape[i]:
                raise bad_value("cache", f"of {name} {new.shape[i]}, like the input and the layer",
                                Came(f"one of {held.shape[i]}"), "Make it with layer.make_cache(...).")  # fmt: skip
        same = new.dtype == held.dtype or torch.is_autocast_enabled(new.device.type)  # which converts
        if not same or new.device != held.device:
            raise bad_value("cache", f"of {new.dtype} on {new.device}", held, "Make it with layer.make_cache(...).")
        if self.used + new.shape[2] > self.capacity:
            raise bad_value(
                "cache", f"of capacity {self.used + new.shape[2]} or more",
                Came(f"one of capacity {self.capacity} with {self.used} tokens in it, for {new.shape[2]} more"),
                "Make a larger one, or reset() it.",
            )  # fmt: skip

    def _forget_trailing(self, hidden: Tensor) -> None:
        """Move samples whose new tokens end in padding to the end, over that padding."""
        with _for_any_mode():
            trailing = hidden.flip(-1).int().cumprod(-1).sum(-1)  # [B]
            if not bool(trailing.any()):
                return
            slots = torch.arange(self.used, device=trailing.device) - trailing[:, None]  # where each's content is now
            fresh, source = slots < 0, slots.clamp_min(0)
            index = source[:, None, :, None].expand(-1, self.column.shape[1], -1, self.column.shape[3])
            held = slice(0, self.used)
            column, value = self.column.clone(), self.value.clone()  # graphs may keep the old ones
            for t in (column, value):
                t[:, :, held] = t[:, :, held].gather(2, index)
            assert self.hidden is not None
            all_hidden = self.hidden.clone()
            all_hidden[:, held] = all_hidden[:, held].gather(1, source) | fresh
        if self._live is not None:
            with _for_any_mode(), torch.enable_grad():
                live = self._held()
                self._live = live[0].gather(2, index), live[1].gather(2, index)
        self.column, self.value, self.hidden = column, value, all_hidden
        self.shift = trailing if self.shift is None else self.shift + trailing

    def reorder(self, index: Tensor) -> None:
        """Let sample b continue what sample `index[b]` held, as beam search asks.

        Args:
            index: `[B]`, int64.
        """
        with _for_any_mode():
            self.column, self.value = self.column[index], self.value[index]
            self.hidden = None if self.hidden is None else self.hidden[index]
            self.shift = None if self.shift is None else self.shift[index]
        if self._live is not None:
            with _for_any_mode(), torch.enable_grad():
                self._live = self._live[0][index], self._live[1][index]

    def detach(self) -> None:
        """Make what it holds a constant: later gradients end here, and its graph is freed."""
        self._live = None

    def reset(self) -> None:
        """Forget everything; the memory stays, unless a graph may want what is in it."""
        if self._kept:
            with _for_any_mode():
                self.column, self.value = torch.zeros_like(self.column), torch.zeros_like(self.value)
        self.used, self.hidden, self.shift, self._kept, self._live = 0, None, None, False, None


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join columns, and join values, token by token."""
    return torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)


@contextmanager
def _for_any_mode() -> Iterator[None]:
    """Make tensors that can be used in any mode: those made in inference mode cannot be used outside."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
