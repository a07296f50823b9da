"""The masks of a layer as bias terms of the attention operation.

In a boolean mask of the layer **True = hidden**, as in `nn.MultiheadAttention`. In PyTorch's
`scaled_dot_product_attention` True = attended.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.spec import BiasTerm
from implicit_attention.equilibrium import maps


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
        return added(part, torch.float32)

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
    return [(term, _kept(mask, dtype)) for term, mask in found]


def _kept(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as the operation keeps it: bool, which is small, but added numbers in a functorch transform."""
    # There a bool tensor that is mapped comes back from `save_for_backward` as one of a level that is gone.
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return mask if torch.compiler.is_compiling() or not maps.transforms_active() else added(mask, dtype)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as numbers that are added to scores: `-inf` where it is True, else 0.

    Args:
        mask: The mask, of any shape.
        dtype: Of the numbers.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
