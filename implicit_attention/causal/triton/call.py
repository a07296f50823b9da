"""Arguments that all Triton kernels of a causal map share: tensors, strides, sizes, and the types of products."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.tiles import padded
from implicit_attention.equilibrium.triton_available import interpreted

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
AT_ONCE = 2**25  # numbers made together where rows are taken in parts: 128 MiB in float32; fewer take more launches
# Change of an own weight since y = v beyond which its row equation is solved. Larger: fewer are, but a row may settle
# at a root that iteration from y = v does not reach. Several roots need a slope p (1 - p) beta > 1.
FAR = 0.02
_FARTHEST = 2**20  # largest stride of rows: the kernels compute offsets within a block in 32 bits


class Call:
    """The arguments that a map gives the kernels of a block: tensors, strides, and the types of products."""

    def __init__(self, system: CausalSystem) -> None:
        self.system, like = system, system.key
        self.key, self.value = rows_contiguous(system.key), rows_contiguous(system.value)
        self.weight = None if system.weight is None else rows_contiguous(system.weight)
        self.given = None if system.self_score is None else system.self_score.detach().contiguous()
        self.turn = None if system.rotation is None else system.rotation.to(system.wide).contiguous()
        self.dp, self.hp = padded(system.dim), padded(system.heads)
        narrow = like.dtype in (torch.float16, torch.bfloat16)
        # Half types multiply on the tensor cores. The interpreter would multiply their bit patterns: it gets float32.
        self.operand = TYPES[system.wide if interpreted() else like.dtype]
        self.precision = "tf32x3" if narrow else "ieee"

    def strides(self) -> dict[str, int]:
        """Strides by the name of the argument."""
        found = {"weight_o": 0 if self.weight is None else self.weight.stride(0)}
        for name, t, dims in (("key", self.key, "bhn"), ("value", self.value, "bgn")):
            found |= {f"{name}_{dim}": stride for dim, stride in zip(dims, t.stride(), strict=False)}
        one = self.turn is None or self.turn.shape[1] == 1
        found["turn_b"] = 0 if one or self.turn is None else self.turn.stride(1)
        found["turn_half"] = 0 if self.turn is None else self.turn.stride(0)
        return found

    def sizes(self) -> dict[str, Any]:
        """Constants that a kernel is compiled for."""
        system = self.system
        return {
            "scale": system.spec.scale, "heads": system.heads, "groups": system.groups, "dim": system.dim,
            "dp": self.dp, "hp": self.hp, "operand": self.operand, "precision": self.precision,
        }  # fmt: skip


def rows_contiguous(t: Tensor) -> Tensor:
    """Return a detached tensor with contiguous rows and a row stride of at most `_FARTHEST`."""
    t = t.detach()
    return t if t.stride(-1) == 1 and t.stride(-2) <= _FARTHEST else t.contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    """Return a detached, contiguous tensor, or None."""
    return None if t is None else t.detach().contiguous()
