"""Low-rank changes of the attention's linear maps, and the weights that they amount to.

Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685 (2021).
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from implicit_attention.training.faults import SettingError

_MAPS = re.compile(r".*\.attention\.(W_Q|W_K|W_V|Omega_V|out_proj)")
_FACTOR = 2  # on the change
_NAME = "default"


def add(model: nn.Module, weights: int) -> int:
    """Give the attention of every block low-rank changes, which begin at zero. All other weights stop learning.

    Args:
        model: The model, changed in place.
        weights: About how many weights they have together; the rank is at least 1.

    Returns:
        How many they have.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        SettingError: If they are more than changes of full rank have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    sizes = [module.weight.shape for name, module in model.named_modules() if _is_map(name, module)]
    per_rank = sum(sum(size) for size in sizes)
    rank, full = max(1, round(weights / per_rank)), min(min(size) for size in sizes)
    if rank > full:
        raise SettingError(
            "lora_weights",
            f"must be at most {full * per_rank:,}, the weights of a change of rank {full}, but is {weights:,}",
        )
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=_FACTOR * rank, target_modules=_MAPS.pattern), model, adapter_name=_NAME
    )
    return rank * per_rank


def _is_map(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and _MAPS.fullmatch(name) is not None


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model without changes that computes the same.

    Args:
        tensors: The weights of a model with or without low-rank changes, whole, by name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".base_layer.")
        if f".{_NAME}.weight" in name:
            continue
        if stem and last == "weight":
            down, up = (tensors[f"{stem}.lora_{part}.{_NAME}.weight"] for part in "AB")
            change = _FACTOR * (up.double() @ down.double())
            tensor = (tensor.double() + change).to(tensor.dtype)
        found[f"{stem}.{last}" if stem else name] = tensor
    return found
