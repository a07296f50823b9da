"""Weights and optimizer states as whole tensors by name, also when processes hold shards of them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from implicit_attention.training.faults import RunError

_SEPARATOR = ":"  # no parameter has it in its name


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers, tied ones once. With sharded weights, every process must call this.

    Args:
        model: The model, not wrapped for data parallelism.

    Returns:
        Whole tensors on the CPU, by name.
    """
    return {name: _whole(tensor) for name, tensor in _stored(model)}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a model the weights of a checkpoint.

    Args:
        model: The model, sharded or not.
        tensors: What `model_tensors` returned.
        source: Where they come from, for messages.

    Raises:
        RunError: If a name is missing or unknown, or a tensor has another shape.
    """
    stored = dict(_stored(model))
    if odd := sorted(stored.keys() ^ tensors.keys()):
        verb = "lacks" if odd[0] in stored else "has, unlike the model,"
        raise RunError(f"{source} is of another model: it {verb} {odd[0]}")
    for name, target in stored.items():
        if target.shape != tensors[name].shape:
            raise RunError(
                f"{source} is of another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"but the model needs {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in stored.items():
            target.copy_(_spread(tensors[name], target))


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state of each parameter. With sharded weights, every process must call this.

    Args:
        model: The model.
        optimizer: Its optimizer.

    Returns:
        Whole tensors on the CPU, by the parameter's name and the optimizer's name of the tensor.
    """
    return {
        f"{name}{_SEPARATOR}{key}": _whole(value)
        for name, parameter in _parameters(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of `optimizer_tensors` into an optimizer.

    Args:
        model: The model, sharded or not.
        optimizer: Its optimizer, which may have taken no step yet.
        tensors: The tensors.
        source: Where they come from, for messages.

    Raises:
        RunError: If they belong to another model.
    """
    parameters = dict(_parameters(model))
    known: dict[str, set[str]] = {name: set() for name, parameter in parameters.items() if parameter.requires_grad}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(_SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None or name not in known or (tensor.dim() and tensor.shape != parameter.shape):
            raise RunError(f"{source} is of another model: it has {full_name} of shape {tuple(tensor.shape)}")
        known[name].add(key)
        # A count of steps stays on the CPU, as torch keeps it by default.
        optimizer.state[parameter][key] = _spread(tensor, parameter).clone() if tensor.dim() else tensor.clone()
    # Before the first step there is no state. After it, every parameter has the same entries.
    most = max(known.values(), key=len, default=set())
    if poor := [name for name in known if known[name] != most]:
        raise RunError(f"{source} is of another model: it lacks {poor[0]}{_SEPARATOR}{min(most - known[poor[0]])}")


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors a checkpoint holds, by name: tied parameters once, and the buffers that state dicts have."""
    yield from _parameters(model)
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by name. Sharded ones are resharded first: a forward pass may have left them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, placed as another one is: on the same device, and sharded the same way."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        # Every process has the whole tensor and takes its own part, so nothing is sent.
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
