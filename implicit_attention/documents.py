"""Packed documents: which tokens of a sample form one, and what does not go with them."""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.errors import Came, bad_type, bad_value


def check_documents(
    x: Tensor, segments: Tensor | None, cu_seqlens: Tensor | None, others: Mapping[str, object]
) -> None:
    """Refuse what cannot say which tokens form a document, and what does not go with documents.

    Args:
        x: Input, `[B, N, D]` or `[N, D]`.
        segments: As in `ImplicitQueryAttention.forward`; this or the next is given.
        cu_seqlens: Likewise.
        others: What does not go with them, by name; None where it is not given.

    Raises:
        TypeError: If it is not of integers.
        ValueError: If it does not fit.
    """
    name, given = ("segments", segments) if segments is not None else ("cu_seqlens", cu_seqlens)
    if segments is not None and cu_seqlens is not None:
        raise bad_value("cu_seqlens", "None next to segments", cu_seqlens, "Both say the same: give one of them.")
    for other, value in others.items():
        if value is not None:
            came = value if isinstance(value, Tensor) else Came(f"a {other}")
            raise bad_value(other, f"None next to {name}", came, _REMEDIES[other])
    check_integers(name, given)
    if segments is not None:
        check_numbers(name, segments, x.shape[:-1])
    if cu_seqlens is not None:
        check_boundaries(name, cu_seqlens)
    if cu_seqlens is not None and x.dim() == 3 and len(x) != 1:
        raise bad_value(name, f"None for a batch of {len(x)}", cu_seqlens,
                        "Put all documents into one sample, or give segments [B, N].")  # fmt: skip


def check_integers(name: str, given: object) -> None:
    """Refuse what cannot hold numbers or boundaries of documents.

    Args:
        name: Of the argument.
        given: The argument.

    Raises:
        TypeError: If it is no tensor of integers.
    """
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        raise bad_type(name, "an int32 or int64 tensor", given)


def check_numbers(name: str, numbers: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse numbers of documents that are not one for each token.

    Args:
        name: Of the argument.
        numbers: The argument.
        shape: Of the tokens.

    Raises:
        ValueError: If they do not fit.
    """
    if numbers.shape != shape:
        raise bad_value(
            name, f"of shape {tuple(shape)}, like the tokens", numbers, "It numbers every token's document."
        )


def check_boundaries(name: str, boundaries: Tensor) -> None:
    """Refuse boundaries of documents whose shape cannot be right. Their values are not looked at.

    Args:
        name: Of the argument.
        boundaries: The argument.

    Raises:
        ValueError: If they do not fit.
    """
    if boundaries.dim() != 1 or len(boundaries) < 2:
        raise bad_value(name, "of shape [documents + 1]", boundaries, "It holds 0 and the end of every document.")


_REMEDIES = {
    "context": "Give every document its own call.",
    "attn_mask": "Say by segments which tokens form a document: they go with a mask.",
    "cache": "A cache holds one document per sample: fill it document by document.",
    "start": "Give every document its own call.",
}


def document_lengths(x: Tensor, segments: Tensor | None, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Return the lengths of documents, one sample after the other. It reads them on the host.

    Args:
        x: Input, `[B, N, D]`.
        segments: `[B, N]`; this or the next is given.
        cu_seqlens: `[documents + 1]`.

    Raises:
        ValueError: If `cu_seqlens` does not rise from 0 to the number of tokens.
    """
    batch, length = x.shape[:2]
    if segments is not None:
        segments = segments.cpu()
        begins = segments.new_ones(batch, length, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        ends = [*begins.flatten().nonzero()[:, 0].tolist(), batch * length]
    else:
        assert cu_seqlens is not None
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            shown = ends if len(ends) < 10 else [*ends[:4], "...", *ends[-4:]]
            raise bad_value("cu_seqlens", f"rising from 0 to the number of tokens, {length}", Came(shown))
    return tuple(end - begin for begin, end in pairwise(ends) if end > begin)


def document_starts(segments: Tensor) -> Tensor:
    """Return where the document of each token begins, `[B, N]`.

    Args:
        segments: `[B, N]`.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    same = F.pad(segments[:, 1:] == segments[:, :-1], (1, 0))
    return place.expand_as(segments).masked_fill(same, 0).cummax(-1).values


def kept_apart(mask: Tensor, starts: Tensor) -> Tensor:
    """Return a mask `[1 or B, 1 or H, N, N]` that hides other documents, too.

    Args:
        mask: Of that shape, bool (True = hidden) or float.
        starts: Where the document of each token begins, `[B, N]`.
    """
    others = (starts[:, :, None] != starts[:, None, :])[:, None]
    return mask | others if mask.dtype == torch.bool else mask.masked_fill(others, -torch.inf)
