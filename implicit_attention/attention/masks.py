"""The masks of a layer as bias terms of the attention operation.

In a boolean mask of the layer **True = hidden**, as in `nn.MultiheadAttention`. In PyTorch's
`scaled_dot_product_attention` True = attended.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.spec import BiasTerm


@dataclass(frozen=True)
class AdditiveMask:
    """A bias term from a mask `[b, h, N or 1, M]`. A float mask is added; a bool mask hides where it is True.

    Attributes:
        first_row: Position of the tensor's first row.
    """

    first_row: int = 0

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return the mask of a block as an additive bias `[b, h, r or 1, c]`."""
        part = tensor[self._part(tensor, rows, cols)]
        if part.dtype != torch.bool:
            return part
        return torch.zeros(part.shape, device=part.device).masked_fill(part, -torch.inf)

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of a float mask for the gradient of a block."""
        found = torch.zeros_like(tensor, dtype=grad.dtype)
        part = self._part(tensor, rows, cols)
        found[part] = grad.sum_to_size(found[part].shape)
        return found

    def _part(self, tensor: Tensor, rows: slice, cols: slice) -> tuple[Any, ...]:
        if tensor.shape[-2] == 1:
            return ..., cols
        return ..., slice(rows.start - self.first_row, rows.stop - self.first_row), cols


@dataclass(frozen=True)
class NotOwn:
    """A bias term that hides each row's own column, whatever its tensor holds."""

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return `-inf` where row and column agree, `[1, 1, r, c]`."""
        i = torch.arange(rows.start, rows.stop, device=tensor.device)[:, None]
        own = i == torch.arange(cols.start, cols.stop, device=tensor.device)
        return torch.zeros(own.shape, device=tensor.device).masked_fill(own, -torch.inf)[None, None]

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of the tensor: zero."""
        return torch.zeros_like(tensor, dtype=grad.dtype)


def mask_terms(
    attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, past: int = 0
) -> list[tuple[BiasTerm, Tensor]]:
    """Return the masks of a call as bias terms with their tensors.

    Args:
        attn_mask: `[1 or B, 1 or H, N, M]`, bool (True = hidden) or float (added).
        padding: `[B, M]`, bool (True = a column hidden from every row) or float (added).
        dtype: Float masks are converted to it.
        past: Number of columns before the first row's own.

    Returns:
        Terms and their tensors, `[1 or B, 1 or H, 1 or N, M]`.
    """
    found: list[tuple[BiasTerm, Tensor]] = []
    if attn_mask is not None:
        found.append((AdditiveMask(past), attn_mask))
    if padding is not None:
        found.append((AdditiveMask(), padding[:, None, None, :]))
    return [(term, mask if mask.dtype == torch.bool else mask.to(dtype)) for term, mask in found]
