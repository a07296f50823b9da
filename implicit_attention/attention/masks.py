"""Who may see whom: the masks of a layer as bias terms of the attention operation.

In the layer a boolean mask says **True = hidden**, as in `nn.MultiheadAttention`; PyTorch's
`scaled_dot_product_attention` says the opposite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_attention.errors import bad_type, bad_value
from implicit_attention.kernels.spec import BiasTerm


@dataclass(frozen=True)
class AdditiveMask:
    """A bias term made from a tensor `[b, h, N or 1, M]`: added if it is float, hiding where True if bool.

    Attributes:
        first_row: The row that the tensor's first row belongs to.
    """

    first_row: int = 0

    def block(self, tensor: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return the mask of a block as an additive bias `[b, h, r or 1, c]`."""
        part = tensor[self._part(tensor, rows, cols)]
        if part.dtype != torch.bool:
            return part
        return torch.zeros(part.shape, device=part.device).masked_fill(part, -torch.inf)

    def pull(self, tensor: Tensor, rows: slice, cols: slice, grad: Tensor) -> Tensor:
        """Return the gradient of a float mask for that of a block."""
        found = torch.zeros_like(tensor, dtype=grad.dtype)
        part = self._part(tensor, rows, cols)
        found[part] = grad.sum_to_size(found[part].shape)
        return found

    def _part(self, tensor: Tensor, rows: slice, cols: slice) -> tuple[Any, ...]:
        if tensor.shape[-2] == 1:
            return ..., cols
        return ..., slice(rows.start - self.first_row, rows.stop - self.first_row), cols


def mask_terms(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    like: Tensor,
    past: int = 0,
) -> list[tuple[BiasTerm, Tensor]]:
    """Check the masks of a call and return them as bias terms with their tensors.

    Args:
        attn_mask: `[N, M]`, `[B * H, N, M]` or `[B, H, N, M]`; bool (True = hidden) or float (added).
        key_padding_mask: `[B, M]`: which columns are hidden from every row; bool or float.
        batch: B.
        heads: H.
        rows: N.
        cols: M.
        like: A tensor with the dtype and device that masks must go with.
        past: Columns that come before those of the rows.

    Returns:
        Terms and their tensors, `[1 or B, 1 or H, 1 or N, M]`.

    Raises:
        TypeError: If a mask is neither bool nor float.
        ValueError: If its shape or device does not fit.
    """
    found: list[tuple[BiasTerm, Tensor]] = []
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, like)
        shapes = {(rows, cols): (1, 1), (batch * heads, rows, cols): (batch, heads)}
        shapes[batch, heads, rows, cols] = (batch, heads)
        lead = shapes.get(tuple(attn_mask.shape))
        if lead is None:
            raise bad_value(
                "attn_mask",
                f"of shape ({rows}, {cols}), ({batch * heads}, {rows}, {cols}) or ({batch}, {heads}, {rows}, {cols})",
                attn_mask,
                "Its rows are output tokens, its columns the tokens they may see.",
            )
        found.append((AdditiveMask(past), attn_mask.reshape(*lead, rows, cols)))
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, like)
        if tuple(key_padding_mask.shape) != (batch, cols):
            raise bad_value("key_padding_mask", f"of shape ({batch}, {cols})", key_padding_mask)
        found.append((AdditiveMask(), key_padding_mask[:, None, None, :]))
    return [(t, m if m.dtype == torch.bool else m.to(like.dtype)) for t, m in found]


def _check_mask(name: str, mask: object, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise bad_type(name, "a bool tensor (True = hidden) or a float tensor (added to the scores)", mask)
    if mask.device != like.device:
        raise bad_value(name, f"on the input's device, {like.device}", mask, f"Move it: {name}.to(x.device).")
