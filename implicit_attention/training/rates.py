"""Learning rates of their own for some of the parameters."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer


def split(optimizer: Optimizer, model: nn.Module, rate: Callable[[str], float | None]) -> None:
    """Give parameters with a learning rate of their own groups of their own.

    Args:
        optimizer: An optimizer of the model's parameters, changed in place before its first step.
        model: The model.
        rate: The learning rate of a parameter with this name; None for that of its group.
    """
    rates = {parameter: rate(name) for name, parameter in model.named_parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if rates[parameter] is not None]
        group["params"] = [parameter for parameter in group["params"] if rates[parameter] is None]
        for found in dict.fromkeys(rates[parameter] for parameter in own):
            alike = [parameter for parameter in own if rates[parameter] == found]
            optimizer.add_param_group({**group, "params": alike, "lr": found})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
