"""A condition on numbers that holds in compiled and exported graphs too, where Python cannot look at them."""

import torch
from torch import Tensor
from torch._library.effects import EffectType


def require(holds: Tensor, message: str) -> None:
    """Raise unless a condition holds. Not checked under `torch.func` transforms, which have no numbers to look at.

    Args:
        holds: The condition, a bool tensor without dimensions.
        message: Of the error.

    Raises:
        ValueError: If it does not hold; from a compiled or exported graph when it runs.
    """
    if torch._C._are_functorch_transforms_active():
        return
    if torch.compiler.is_compiling():
        _require(holds, message)
    elif not bool(holds):
        raise ValueError(message)


@torch.library.custom_op("implicit_attention::require", mutates_args=())
def _require(holds: Tensor, message: str) -> None:
    if not bool(holds):
        raise ValueError(message)


@_require.register_fake
def _(holds: Tensor, message: str) -> None:
    return None


_require.register_effect(EffectType.ORDERED)  # without it the compiler drops an operator that returns nothing
