"""Packed documents of a call: which tokens form one, as transformers' models are told it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from implicit_attention.documents import check_boundaries, check_integers, check_numbers
from implicit_attention.errors import bad_value, required


def documents(x: Tensor, position_ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    """Return which document each token of a packed call belongs to, `[B, n]`; None if samples are documents.

    Args:
        x: New tokens, `[B, n, D]`.
        position_ids: `[B, n]`, where positions that restart mean documents: as in transformers, where there is neither
            an attention mask nor a cache. Else None.
        given: May hold `cu_seq_lens_q`, boundaries of documents in a batch of one, `[documents + 1]`; `cu_seq_lens_k`,
            the same; and `seq_idx`, the number of each token's document, `[B, n]`.

    Raises:
        TypeError: If one is no tensor of integers.
        ValueError: If one does not fit, or they disagree.
    """
    numbers, by_boundaries = given.get("seq_idx"), _by_boundaries(x, given)
    if numbers is None:
        if by_boundaries is not None or position_ids is None:
            return by_boundaries
        return find_packed_sequence_indices(position_ids)
    check_integers("seq_idx", numbers)
    check_numbers("seq_idx", numbers, x.shape[:2])
    begins = _changes(numbers.to(x.device))  # two runs of one number are two documents
    segments = begins.cumsum(-1)
    if by_boundaries is None:
        return segments
    return required(
        segments,
        (begins == _changes(by_boundaries)).all(),
        "`seq_idx` must change where a document of `cu_seq_lens_q` begins, and only there, but they disagree. Both say "
        "the same: give one of them.",
    )


def _by_boundaries(x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """The documents of `cu_seq_lens_q`, `[1, n]`; None if it is not given."""
    first, second = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    for name, boundaries in (("cu_seq_lens_q", first), ("cu_seq_lens_k", second)):
        if boundaries is not None:
            check_integers(name, boundaries)
            check_boundaries(name, boundaries)
    if second is not None and (first is None or first.shape != second.shape):
        raise bad_value("cu_seq_lens_k", "the same as cu_seq_lens_q", second, _OWN)
    if first is None:
        return None
    batch, length = x.shape[:2]
    if batch != 1:
        raise bad_value("cu_seq_lens_q", f"None for a batch of {batch}", first,
                        "Put all documents into one sample, or give position_ids that restart.")  # fmt: skip
    bounds = first.to(x.device)
    rising = (bounds[0] == 0) & (bounds[-1] == length) & (bounds.diff() >= 0).all()
    bounds = required(bounds, rising, f"`cu_seq_lens_q` must be rising from 0 to the number of tokens, {length}, but "
                      "got other numbers. It holds 0 and the end of every document.")  # fmt: skip
    if second is not None and second is not first:
        same = (bounds == second.to(x.device)).all()
        bounds = required(bounds, same, f"`cu_seq_lens_k` must be the same as cu_seq_lens_q. {_OWN}")
    return torch.bucketize(torch.arange(length, device=x.device), bounds[1:].long(), right=True)[None]


_OWN = "Tokens attend to their own document."


def _changes(numbers: Tensor) -> Tensor:
    """Whether each token's number is another than that of the token before, `[B, n]`; False for the first."""
    return F.pad(numbers.diff(dim=-1) != 0, (1, 0))
