"""Packed sequences: several documents in one row of tokens, each an equilibrium of its own.

The linear maps see the tokens as they are packed. Then documents of similar length form batches, which are solved as
any batch is: there is no mask between documents, and no work. Results go back to where their tokens stand.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from implicit_attention.attention.map import AttentionMap
from implicit_attention.documents import document_lengths
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.inputs import Inputs

READS = "The lengths of packed documents (segments, cu_seqlens) are read on the host."
IN_A_GRAPH = (
    "Or give documents as samples, [docs, L, D]; or segments next to an attn_mask, which may hide nothing (zeros(N, N) "
    "of bool): no lengths are read then."
)
_OVERHEAD = 128  # tokens: what a batch costs beyond its own; between 64 and 256 the measured times hardly differ


@dataclass(frozen=True)
class Packing:
    """Where the documents of packed tokens go, and where they come from. A batch of them is `[docs, L]` tokens.

    Attributes:
        shape: B and N of the packed tokens.
        batches: The `[docs, L]` of each batch.
        order: The packed token that stands at each place of all batches, one after the other, `[P]`.
        padding: Whether a place is behind the end of its document, `[P]`; None if no place is.
        place: The place of each packed token, `[B N]`.
        moved: Whether tokens stand in the batches in another way than they are packed.
    """

    shape: tuple[int, int]
    batches: tuple[tuple[int, int], ...]
    order: Tensor
    padding: Tensor | None
    place: Tensor
    moved: bool

    @classmethod
    def of(cls, inputs: Inputs, *, padded: bool) -> "Packing":
        """Look at the documents of a call, on the host, and batch them.

        Args:
            inputs: Of the call, with documents.
            padded: Whether documents of different lengths may share a batch.

        Returns:
            The packing.

        Raises:
            ValueError: If `cu_seqlens` does not hold the boundaries of documents.
        """
        lengths = document_lengths(inputs.x, inputs.segments, inputs.cu_seqlens)
        groups = grouped(lengths, padded=padded)
        size = torch.tensor(lengths, device="cpu")
        first = size.cumsum(0) - size
        orders, paddings = [], []
        for group in groups:
            documents, offset = (
                torch.tensor(group, device="cpu")[:, None],
                torch.arange(lengths[group[0]], device="cpu"),
            )
            behind = offset >= size[documents]
            orders.append((first[documents] + offset.masked_fill(behind, 0)).flatten())
            paddings.append(behind.flatten())
        order, padding = torch.cat(orders), torch.cat(paddings)
        place = size.new_empty(sum(lengths))
        place[order[~padding]] = (~padding).nonzero()[:, 0]
        device = inputs.x.device
        return cls(
            shape=(inputs.x.shape[0], inputs.x.shape[1]),
            batches=tuple((len(group), lengths[group[0]]) for group in groups),
            order=order.to(device),
            padding=padding.to(device) if bool(padding.any()) else None,
            place=place.to(device),
            moved=not torch.equal(place, torch.arange(len(order), device="cpu")),
        )

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Return what packed tokens `[B, N, ...]` hold, in batches `[docs, L, ...]`, zeros in the padding.

        Keys of zero make the padding's own equations explicit: its weights do not depend on any output.
        """
        found = packed.flatten(0, 1)
        if self.moved:
            found = found.index_select(0, self.order)
        if self.padding is not None:
            found = found.masked_fill(self.padding.view(-1, *[1] * (found.dim() - 1)), 0)
        return [part.view(*shape, *found.shape[1:]) for part, shape in zip(self._cut(found), self.batches, strict=True)]

    def _cut(self, places: Tensor) -> tuple[Tensor, ...]:
        """What stands at all places, `[P, ...]`, by batch."""
        return torch.split(places, [documents * length for documents, length in self.batches])

    def pack(self, batches: Iterable[Tensor]) -> Tensor:
        """Return what batches `[docs, L, ...]` hold as packed tokens `[B, N, ...]`."""
        flat = torch.cat([batch.flatten(0, 1) for batch in batches])
        if self.moved:
            flat = flat.index_select(0, self.place)
        return flat.view(*self.shape, *flat.shape[1:])

    def unpack_inputs(self, inputs: Inputs) -> list[Inputs]:
        """Return the inputs of each batch. Their x has the right shape, dtype and device, and no content."""
        masks: Sequence[Tensor | None] = [None] * len(self.batches)
        if inputs.key_padding_mask is not None:
            masks = self.unpack(inputs.key_padding_mask)
        empty = inputs.x.new_zeros(())
        pairs = zip(self.batches, masks, strict=True)
        return [Inputs(empty.expand(*shape, inputs.x.shape[-1]), key_padding_mask=mask) for shape, mask in pairs]

    def pack_solutions(self, solutions: list[Solution]) -> Solution:
        """Return the solutions of all batches as one: every figure per token, `[B, N]`.

        A batch that took fewer steps stays where it ended. What direct solvers left stands one after the other.
        """
        per_token = [_per_token(s, length) for s, (_, length) in zip(solutions, self.batches, strict=True)]
        whole = {name: self.pack(figures[name] for figures in per_token) for name in per_token[0]}
        histories = [s.history for s in solutions if s.history is not None]
        history = None
        if histories:
            steps = range(max(map(len, histories)))
            history = [self.pack(h[min(step, len(h) - 1)] for h in histories) for step in steps]
        return Solution(
            value=self.pack(s.value for s in solutions),
            residual=whole["residual"],
            steps=whole["steps"],
            converged=whole["converged"],
            abs_trace=self._pack_traces([f.abs_trace for f in solutions]),
            rel_trace=self._pack_traces([f.rel_trace for f in solutions]),
            evaluations=max(s.evaluations for s in solutions),
            history=history,
            memo=tuple(t for s in solutions for t in s.memo),
        )

    def _pack_traces(self, traces: list[Tensor]) -> Tensor:
        """`[steps + 1, B, N]` from traces `[steps + 1, docs]` or `[steps + 1, docs, L]` of different lengths."""
        longest, found = max(map(len, traces)), []
        for trace, (_, length) in zip(traces, self.batches, strict=True):
            trace = torch.cat([trace, trace[-1:].expand(longest - len(trace), *trace.shape[1:])])
            trace = trace if trace.dim() == 3 else trace[..., None].expand(-1, -1, length)
            found.append(trace.movedim(0, -1))
        return self.pack(found).movedim(-1, 0)

    def block_diagonal(self, weights: list[Tensor]) -> Tensor:
        """Return the attention matrices `[docs, H, L, L]` of all batches as one, `[B, H, N, N]`."""
        (batch, length), heads = self.shape, weights[0].shape[1]
        out = weights[0].new_zeros(batch, length, length, heads)
        real = self.unpack(torch.ones(self.shape, dtype=torch.bool, device=self.order.device))
        for found, token, seen in zip(weights, self._cut(self.order), real, strict=True):
            document, row, col = (seen[:, :, None] & seen[:, None, :]).nonzero(as_tuple=True)
            token = token.view(seen.shape)
            at = (token[document, 0] // length, token[document, row] % length, token[document, col] % length)
            out = out.index_put(at, found.permute(0, 2, 3, 1)[document, row, col])
        return out.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PackedMap:
    """F of packed documents: the map of each batch, applied to its documents. Its tensors are those of all maps.

    Attributes:
        packing: Where documents go.
        maps: The maps of the batches.
    """

    packing: Packing
    maps: tuple[AttentionMap, ...]

    @property
    def system_ndim(self) -> int:
        """Leading dimensions of y that are independent systems, as in `AttentionMap`; rows of several documents."""
        return self.maps[0].system_ndim

    @property
    def row_ndim(self) -> int:
        """Leading dimensions of y that are judged one by one, as in `AttentionMap`."""
        return self.maps[0].row_ndim

    def __call__(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return F(y), `[B, N, D]`, for y `[B, N, D]`."""
        parts = zip(self.maps, self.packing.unpack(y), self.by_batch(tensors), strict=True)
        return self.packing.pack(function(own, *args) for function, own, args in parts)

    def weights(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the attention matrix `[B, H, N, N]` at y, zero between documents, before dropout."""
        parts = zip(self.maps, self.packing.unpack(y), self.by_batch(tensors), strict=True)
        return self.packing.block_diagonal([function.weights(own, *args) for function, own, args in parts])

    def by_batch(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the tensors of each batch's map."""
        found, rest = [], tuple(tensors)
        for function in self.maps:
            found.append(rest[: len(function.names)])
            rest = rest[len(function.names) :]
        return found


def _per_token(solution: Solution, length: int) -> dict[str, Tensor]:
    """The figures `[docs]` or `[docs, L]` of a batch's solution as `[docs, L]`."""
    figures = {name: getattr(solution, name) for name in ("residual", "steps", "converged")}
    return {n: t if t.dim() == 2 else t[:, None].expand(-1, length) for n, t in figures.items()}


@lru_cache(maxsize=16)  # all layers of a model ask the same
def grouped(lengths: tuple[int, ...], *, padded: bool) -> tuple[tuple[int, ...], ...]:
    """Return which documents form a batch, the longest of each first.

    If documents may be padded, the batches cost the least together: `docs L` tokens, padding among them, and
    an overhead for each batch. Otherwise all documents of a batch are equally long.

    Args:
        lengths: Of the documents.
        padded: Whether documents may be padded to the longest of their batch.

    Returns:
        The numbers of the documents, by batch.
    """
    equal: dict[int, list[int]] = {length: [] for length in sorted(lengths, reverse=True)}
    for document, length in enumerate(lengths):
        equal[length].append(document)
    if not padded:
        return tuple(map(tuple, equal.values()))
    sizes = list(equal)
    least, cut = [0.0], [0]  # of the batches of the first so many sizes: the cost; where the last of them begins
    for end in range(1, len(sizes) + 1):
        best, begin, documents = float("inf"), end, 0
        for start in range(end - 1, -1, -1):
            documents += len(equal[sizes[start]])
            own = documents * sizes[start] + _OVERHEAD
            if own >= best:
                break  # it only grows
            if least[start] + own < best:
                best, begin = least[start] + own, start
        least.append(best)
        cut.append(begin)
    found, end = [], len(sizes)
    while end:
        found.append(tuple(document for size in sizes[cut[end] : end] for document in equal[size]))
        end = cut[end]
    return tuple(reversed(found))
