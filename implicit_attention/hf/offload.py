"""Weights that accelerate keeps elsewhere: brought to the device for a solve, which reads them without a call."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def weights_on_device(layer: nn.Module) -> Iterator[None]:
    """Let accelerate's hooks bring a layer's weights, and take them away again.

    Hooks act when a module is called. A solve reads the layer's own weights, and those of maps that it applies many
    times, without a call.

    Args:
        layer: The layer.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with ExitStack() as stack:
        for module in layer.modules():
            hook = module.__dict__.get("_hf_hook")  # a module's own attribute search is slow where there is none
            if hook is not None and getattr(hook, "offload", False):
                hook.pre_forward(module)
                stack.callback(_leave, hook, module)
        yield


def _leave(hook: Any, module: nn.Module) -> None:
    hook.post_forward(module, None)
