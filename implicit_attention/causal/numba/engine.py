"""What calls the compiled kernels: what they are told, their scratch, and what they leave."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.causal.diagonal import (
    FAR,
    NEAR_SINGULAR,
    SAME_ROOT,
    SLOW,
    BlockAdjoint,
    hand_back,
    near_singular,
)
from implicit_attention.causal.numba import adjoint, adjoint_layout, forward, layout
from implicit_attention.causal.numba.machine import LANES, threads
from implicit_attention.causal.system import CausalSystem


class _Kernel:
    """One kernel and what it is told, the same for all blocks: sizes, strides, addresses of tensors that live here."""

    def __init__(self, kernel: Any, module: Any, system: CausalSystem, block: int, numbers: list[float]) -> None:
        self.kernel, self.module, self.system = kernel, module, system
        like, batch, groups, d = system.key, system.batch, system.groups, system.dim
        vector = 2 * LANES // like.element_size()
        self.padded, width = -(-d // vector) * vector, -(-block // vector) * vector
        self.count = threads().count
        team = self.count if batch % self.count and groups >= self.count else 1  # all threads on each sample, or one
        slot = sum(module.scratch_sizes(system.heads, groups, d, self.padded, width, block))
        slot += -slot % vector
        self.kept: dict[str, Tensor] = {}
        self.told = np.zeros(module.COUNT + 1, dtype=np.int64)
        sizes = {
            "BATCH": batch, "HEADS": system.heads, "GROUPS": groups, "LENGTH": system.length, "DIM": d,
            "PADDED": self.padded, "WIDTH": width, "VECTOR": vector, "BLOCK": block, "SLOT": slot,
            "TEAM": team, "COUNT": self.count, "BARRIER": threads().barrier, "THREAD": threads().number,
        }  # fmt: skip
        for name, value in sizes.items():
            self.tell(name, value)
        self.keep("NUMBERS", torch.tensor(numbers, dtype=like.dtype))
        self.keep("SCRATCH", like.new_empty(slot * (1 if team > 1 else self.count)))
        self.keep("STATUS", torch.zeros(batch, dtype=torch.long))
        self.keep_strided("KEY", system.key, "BHN")
        self.keep_strided("VALUE", system.value, "BGN")
        if system.self_score is not None:
            self.keep("GIVEN", system.self_score.contiguous())
        if system.rotation is not None:
            turn = system.rotation.to(like.dtype).contiguous()
            self.keep("TURN", turn)
            self.tell("TURN_B", 0 if turn.shape[1] == 1 else turn.stride(1))
            self.tell("TURN_HALF", turn.stride(0))

    def tell(self, name: str, value: int) -> None:
        self.told[getattr(self.module, name)] = value

    def keep(self, name: str, t: Tensor) -> None:
        assert t.is_contiguous()
        self.kept[name] = t.detach()
        self.tell(name, t.data_ptr())

    def keep_strided(self, name: str, t: Tensor, dims: str) -> None:
        self.kept[name] = t = t.detach() if t.stride(-1) == 1 else t.detach().contiguous()
        self.tell(name, t.data_ptr())
        for dim, stride in zip(dims, t.stride(), strict=False):
            self.tell(f"{name}_{dim}", stride)

    def run(self, rows: slice) -> list[int]:
        """Run the kernel on a block; return what it says about each sample."""
        self.tell("FIRST", rows.start)
        self.tell("STOP", rows.stop)
        bias = self.system.compiled_bias(rows)
        if bias is not None:
            self.keep("STRICT", bias[0])
            self.tell("STRICT_B", bias[1])
            self.tell("STRICT_H", bias[2])
        threads().run(self.kernel, self.told.ctypes.data, self.count)
        said: list[int] = self.kept["STATUS"].tolist()
        return said

    def part(self, name: str, *shape: int) -> Tensor:
        """The start of a buffer, in a shape."""
        return self.kept[name][: math.prod(shape)].view(shape)


class ForwardKernel:
    """Settles diagonal blocks in place."""

    def __init__(self, system: CausalSystem, into: dict[str, Tensor], block: int, rtol: float, atol: float) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map, float32 or float64 on the CPU, without dropout.
            into: The tensors of the recursion by name: y `[B, N, H, d]` and lse `[B, H, N]`, which hold attention
                over the columns before the block; query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a norm),
                residual, size, sweeps `[B, N]`.
            block: The most rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        self.system, self.into = system, into
        like, d = system.key, system.dim
        kernel = forward.forward32() if like.dtype == torch.float32 else forward.forward64()
        eps = system.function.query_map.eps
        numbers = [system.spec.scale, eps, rtol, atol, 0.0, 1.0, torch.inf, 1.0 / d, FAR, SAME_ROOT, SLOW]
        self._call = call = _Kernel(kernel, layout, system, block, numbers)
        for name, t in into.items():
            if t.numel():
                call.keep(name.upper(), t)
        call.keep("BEFORE_Y", like.new_empty(system.batch * block * system.heads * d))
        call.keep("BEFORE_LSE", like.new_empty(system.batch * system.heads * block))
        if system.weight is not None:
            made = system.weight.reshape(system.groups, d, system.heads, d).permute(0, 2, 3, 1)  # [G, H, d (y), d (q)]
            call.keep("WEIGHT", F.pad(made, (0, call.padded - d)).contiguous())
        if system.bias is not None:
            call.keep("CONSTANT", system.bias.contiguous())
        if system.added is not None:
            call.keep("ADDED", system.added.contiguous())

    def settle(self, rows: slice) -> int:
        """Settle a block's rows up to the first few that want the row solver; the rest is left as it was.

        Args:
            rows: The block.

        Returns:
            The first row that is not settled; the end of the block if all are.
        """
        call, system = self._call, self.system
        done = call.run(rows)
        n = rows.stop - rows.start
        y = call.part("BEFORE_Y", system.batch, n, system.heads, system.dim)
        lse = call.part("BEFORE_LSE", system.batch, system.heads, n)
        return hand_back(self.into, y, lse, rows, done)


class AdjointKernel:
    """Solves the adjoint of diagonal blocks."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, later: Tensor, allowed: Tensor, block: int
    ) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map, as for `ForwardKernel`.
            at: The equilibrium: y `[B, N, H, d]`, query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a
                norm), lse `[B, H, N]`.
            grad: Cotangent, `[B, N, H, d]`.
            later: Cotangent of the queries from rows after the block, `[B, N, G, d]`; the caller keeps it.
            allowed: Tolerance per sample, `[B]`.
            block: The most rows of a block.
        """
        self.system = system
        like, batch, heads, groups, d = system.key, system.batch, system.heads, system.groups, system.dim
        kernel = adjoint.adjoint32() if like.dtype == torch.float32 else adjoint.adjoint64()
        norm = 1.0 if system.weight is None else float(system.weight.norm(dim=0).max())
        numbers = [system.spec.scale, norm, 0.0, 1.0, torch.inf, 1.0 / d, NEAR_SINGULAR]
        self._call = call = _Kernel(kernel, adjoint_layout, system, block, numbers)
        for name, t in at.items():
            if t.numel():
                call.keep(name.upper(), t.contiguous())
        call.keep_strided("GRAD", grad.to(like.dtype), "BNH")
        call.keep("LATER", later)
        call.keep("ALLOWED", allowed.to(like.dtype).contiguous())
        call.keep("RESIDUAL", like.new_zeros(batch))
        call.keep("SWEEPS", torch.zeros(batch, dtype=torch.long))
        call.keep("SUSPECT", torch.zeros(batch * block, dtype=torch.long))
        sizes = {"LAM": heads * d, "MADE": groups * d, "D_KEY": heads * d, "D_VALUE": groups * d, "OWN": heads}
        sizes["GAIN"] = heads * heads
        for name, size in sizes.items():
            call.keep(name, like.new_empty(batch * block * size))
        if system.weight is not None:
            made = system.weight.reshape(groups * d, heads, d).permute(1, 0, 2)  # [H, G d, d]
            call.keep("WEIGHT", F.pad(made, (0, call.padded - d)).contiguous())

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; None if it has rows that want another solver.

        Args:
            rows: The block.

        Returns:
            The solution, in buffers that the next call overwrites; `slope` is its diagonal alone, `[B, H, n, 1]`.
        """
        call, system, n = self._call, self.system, rows.stop - rows.start
        suspects = call.kept["SUSPECT"].zero_()
        if not all(call.run(rows)):
            return None
        batch, heads, groups, d = system.batch, system.heads, system.groups, system.dim
        return BlockAdjoint(
            lam=call.part("LAM", batch, n, heads, d),
            d_made=call.part("MADE", batch, n, groups * d),
            d_key=call.part("D_KEY", batch, heads, n, d),
            d_value=call.part("D_VALUE", batch, groups, n, d),
            slope=call.part("OWN", batch, heads, n, 1),
            residual=call.kept["RESIDUAL"].clone(),
            sweeps=int(call.kept["SWEEPS"].max()),
            near_singular=near_singular(call.kept["GAIN"].view(-1, heads, heads)[suspects > 0]),
        )
