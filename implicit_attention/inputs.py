"""What may enter a layer: checks of its input tensors, and the message when one is not finite."""

import torch
from torch import Tensor

from implicit_attention.errors import bad_type, bad_value, first_non_finite


def check_input(name: str, x: object, weight: Tensor, embed_dim: int, *, any_lead: bool = False) -> None:
    """Refuse what cannot be an input `[B, N, D]` or `[N, D]` (any leading dimensions with `any_lead`)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise bad_type(name, f"a float tensor [B, N, {embed_dim}]", x)
    shape_fits = x.dim() >= 2 if any_lead else x.dim() in (2, 3)
    if not shape_fits or x.shape[-1] != embed_dim:
        lead = "..." if any_lead else "B"
        raise bad_value(name, f"of shape [{lead}, N, {embed_dim}] or [N, {embed_dim}]", x,
                        f"The last dimension must be embed_dim={embed_dim}.")  # fmt: skip
    if x.shape[-2] == 0:
        raise bad_value(name, "of at least one token (N >= 1)", x, "An empty sequence has no equilibrium.")
    if x.device != weight.device:
        raise bad_value(name, f"on the parameters' device, {weight.device}", x, f"Move it: {name}.to(layer device).")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise bad_type(name, f"of the parameters' dtype, {weight.dtype}", x,
                       f"Convert it ({name}.to({weight.dtype})) or the layer (layer.to({x.dtype})).")  # fmt: skip


def non_finite(named: dict[str, Tensor | None]) -> ValueError:
    """Return the error for an output that is not finite, naming the input or parameter to blame."""
    found = first_non_finite(named)
    if found is None:
        return ValueError(
            "The attention scores overflow though the inputs and weights are finite: scale them down, use "
            "qk_norm=True, or a wider dtype."
        )
    return ValueError(f"{found}: an equilibrium cannot be solved from it. Check what made it.")
