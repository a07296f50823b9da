"""Fully sharded data parallelism with torch's own `fully_shard`, on any device and any backend."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, *, bf16: bool) -> None:
    """Shard weights, gradients and the optimizer's state over all processes (FSDP2, ZeRO-3), block by block.

    Accelerate does this on GPUs only. These calls also run on CPUs, so tests cover what a cluster runs.

    Args:
        model: The model, on this process's device; changed in place.
        bf16: Gather weights and compute in bfloat16; gradients are summed in float32.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
