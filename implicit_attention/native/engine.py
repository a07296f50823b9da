"""What calls the compiled kernels: which calls they serve, what they are told, and their scratch."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.causal_system import CausalSystem
from implicit_attention.diagonal import BlockAdjoint
from implicit_attention.native import adjoint as a
from implicit_attention.native import forward as k
from implicit_attention.native.machine import LANES, threads


class NativeForward:
    """Settles diagonal blocks in place: outputs, queries, log-sum-exp, residuals."""

    def __init__(self, system: CausalSystem, into: dict[str, Tensor], block: int, rtol: float, atol: float) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            into: The tensors of the recursion by name: y `[B, N, H, d]`, query `[B, N, G, d]`, inverse
                `[B, N, G, 1]` (empty without a norm), lse `[B, H, N]`, residual, size, sweeps `[B, N]`.
            block: The most rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        self.system, self.into = system, into
        like, info = system.key, torch.finfo(system.narrow)
        self.kernel = k.forward32 if like.dtype == torch.float32 else k.forward64
        heads, groups, d = system.heads, system.groups, system.dim
        vector = 2 * LANES // like.element_size()
        padded, width = -(-d // vector) * vector, -(-block // vector) * vector
        numbers = [system.spec.scale, system.function.query_map.eps, rtol, atol, 0.0, 1.0, torch.inf, 1.0 / d, k.FAR, 1e-2, 0.7]
        self.numbers = torch.tensor(numbers, dtype=like.dtype)
        del info
        count = threads().count
        whole = system.batch % count != 0 and groups >= count
        slot = sum(k.scratch_sizes(heads, groups, d, padded, width, block))
        slot += -slot % vector
        self.count = count
        self.kept: dict[int, Tensor] = {
            k.KEY: _unit(system.key),
            k.VALUE: _unit(system.value),
            k.Y: into["y"],
            k.QUERY: into["query"],
            k.LSE: into["lse"],
            k.RESIDUAL: into["residual"],
            k.SIZE: into["size"],
            k.SWEEPS: into["sweeps"],
            k.NUMBERS: self.numbers,
            k.SCRATCH: like.new_empty(slot * (1 if whole else count)),
            k.BEFORE_Y: like.new_empty(system.batch * block, heads, d),
            k.BEFORE_LSE: like.new_empty(system.batch * heads * block),
            k.STATUS: torch.zeros(system.batch, dtype=torch.long),
        }
        if into["inverse"].numel():
            self.kept[k.INVERSE] = into["inverse"]
        if system.weight is not None:
            made = system.weight.view(groups, d, heads, d).permute(0, 2, 3, 1)  # [G, H, d (in), d (out)]
            self.kept[k.WEIGHT] = F.pad(made, (0, padded - d)).contiguous()
        given = {k.CONSTANT: system.bias, k.ADDED: system.added, k.GIVEN: system.self_score}
        self.kept |= {at: t.to(like.dtype).contiguous() for at, t in given.items() if t is not None}
        told: dict[int, int] = {}
        if system.rotation is not None:
            turn = self.kept[k.TURN] = system.rotation.to(like.dtype).contiguous()
            told[k.TURN_B] = 0 if turn.shape[1] == 1 else turn.stride(1)
            told[k.TURN_HALF] = turn.stride(0)
        for first, t in ((k.KEY_B, self.kept[k.KEY]), (k.VALUE_B, self.kept[k.VALUE])):
            told |= {first + i: t.stride(i) for i in range(3)}
        told |= {k.SLOT: slot, k.TEAM: count if whole else 1, k.COUNT: count, k.BLOCK: block}
        told |= {k.BATCH: system.batch, k.HEADS: heads, k.GROUPS: groups, k.LENGTH: system.length, k.DIM: d}
        told |= {k.PADDED: padded, k.WIDTH: width, k.VECTOR: vector}
        told |= {k.BARRIER: threads().barrier, k.THREAD: threads().number}
        told |= {at: t.data_ptr() for at, t in self.kept.items()}
        self.told = np.zeros(k.COUNT + 1, dtype=np.int64)
        for at, value in told.items():
            self.told[at] = value
        self.biased = not system.spec.plain
        self.block = block

    def settle(self, rows: slice) -> int:
        """Settle a block's rows up to the first few whose own equations want the row solver; the rest is as before.

        Args:
            rows: The block.

        Returns:
            The first row that is not settled; the end of the block if all are.
        """
        told, system = self.told, self.system
        told[k.FIRST], told[k.STOP] = rows.start, rows.stop
        if self.biased:
            _take_bias(system, rows, self.kept, told, (k.STRICT, k.STRICT_B, k.STRICT_H))
        threads().run(self.kernel, told.ctypes.data, self.count)
        done = self.kept[k.STATUS].tolist()
        least, n = min(done), rows.stop - rows.start
        if least == n:
            return rows.stop
        y = self.kept[k.BEFORE_Y][: system.batch * n].view(system.batch, n, system.heads, system.dim)
        lse = self.kept[k.BEFORE_LSE][: system.batch * system.heads * n].view(system.batch, system.heads, n)
        for b, settled in enumerate(done):
            restored = slice(rows.start + least, rows.start + settled)
            self.into["y"][b, restored] = y[b, least:settled]
            self.into["lse"][b, :, restored] = lse[b, :, least:settled]
        return rows.start + least


class NativeAdjoint:
    """Solves the adjoint of diagonal blocks."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, later: Tensor, allowed: Tensor, block: int
    ) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            at: The equilibrium: y `[B, N, H, d]`, query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a
                norm), lse `[B, H, N]`.
            grad: Cotangent, `[B, N, H, d]`.
            later: Cotangent of the queries from rows after the block, `[B, N, G, d]`, written by the caller.
            allowed: Tolerance per sample, `[B]`.
            block: The most rows of a block.
        """
        self.system, self.block = system, block
        like = system.key
        self.kernel = a.adjoint32 if like.dtype == torch.float32 else a.adjoint64
        heads, groups, d = system.heads, system.groups, system.dim
        vector = 2 * LANES // like.element_size()
        padded, width = -(-d // vector) * vector, -(-block // vector) * vector
        norm = 1.0 if system.weight is None else float(system.weight.norm(dim=0).max())
        count = threads().count
        whole = system.batch % count != 0 and groups >= count
        slot = sum(a.scratch_sizes(heads, groups, d, padded, width, block))
        slot += -slot % vector
        self.count, new, batch = count, like.new_empty, system.batch
        numbers = [system.spec.scale, norm, 0.0, 1.0, torch.inf, 1.0 / d]
        self.kept: dict[int, Tensor] = {
            a.KEY: _unit(system.key),
            a.VALUE: _unit(system.value),
            a.Y: at["y"].contiguous(),
            a.QUERY: at["query"].contiguous(),
            a.LSE: at["lse"].contiguous(),
            a.GRAD: _unit(grad),
            a.LATER: later,
            a.ALLOWED: allowed,
            a.NUMBERS: torch.tensor(numbers, dtype=like.dtype),
            a.SCRATCH: new(slot * (1 if whole else count)),
            a.LAM: new(batch * block * heads * d),
            a.MADE: new(batch * block * groups * d),
            a.D_KEY: new(batch * heads * block * d),
            a.D_VALUE: new(batch * groups * block * d),
            a.OWN: new(batch * heads * block),
            a.RESIDUAL: torch.zeros_like(allowed),
            a.SWEEPS: torch.zeros(batch, dtype=torch.long),
            a.STATUS: torch.zeros(batch, dtype=torch.long),
        }
        if at["inverse"].numel():
            self.kept[a.INVERSE] = at["inverse"].contiguous()
        if system.weight is not None:
            made = system.weight.view(groups * d, heads, d).permute(1, 0, 2)  # [H, G d, d]
            self.kept[a.WEIGHT] = F.pad(made, (0, padded - d)).contiguous()
        if system.self_score is not None:
            self.kept[a.GIVEN] = system.self_score.to(like.dtype).contiguous()
        told: dict[int, int] = {}
        if system.rotation is not None:
            turn = self.kept[a.TURN] = system.rotation.to(like.dtype).contiguous()
            told[a.TURN_B] = 0 if turn.shape[1] == 1 else turn.stride(1)
            told[a.TURN_HALF] = turn.stride(0)
        for first, t in ((a.KEY_B, self.kept[a.KEY]), (a.VALUE_B, self.kept[a.VALUE]), (a.GRAD_B, self.kept[a.GRAD])):
            told |= {first + i: t.stride(i) for i in range(3)}
        told |= {a.SLOT: slot, a.TEAM: count if whole else 1, a.COUNT: count, a.BLOCK: block}
        told |= {a.BATCH: system.batch, a.HEADS: heads, a.GROUPS: groups, a.LENGTH: system.length, a.DIM: d}
        told |= {a.PADDED: padded, a.WIDTH: width, a.VECTOR: vector}
        told |= {a.BARRIER: threads().barrier, a.THREAD: threads().number}
        told |= {at_: t.data_ptr() for at_, t in self.kept.items()}
        self.told = np.zeros(a.COUNT + 1, dtype=np.int64)
        for at_, value in told.items():
            self.told[at_] = value

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; None if it has rows whose own equations want solving exactly.

        Args:
            rows: The block.

        Returns:
            The solution, in buffers that the next call overwrites; of `slope` the diagonal alone.
        """
        told, system, n = self.told, self.system, rows.stop - rows.start
        told[a.FIRST], told[a.STOP] = rows.start, rows.stop
        if not system.spec.plain:
            _take_bias(system, rows, self.kept, told, (a.STRICT, a.STRICT_B, a.STRICT_H))
        threads().run(self.kernel, told.ctypes.data, self.count)
        if not all(self.kept[a.STATUS].tolist()):
            return None
        batch, heads, groups, d = system.batch, system.heads, system.groups, system.dim

        def part(at: int, *shape: int) -> Tensor:
            return self.kept[at][: math.prod(shape)].view(shape)

        return BlockAdjoint(
            part(a.LAM, batch, n, heads, d), part(a.MADE, batch, n, groups * d), part(a.D_KEY, batch, heads, n, d),
            part(a.D_VALUE, batch, groups, n, d), part(a.OWN, batch, heads, n, 1),
            self.kept[a.RESIDUAL].clone(), int(self.kept[a.SWEEPS].max()), 0,
        )  # fmt: skip


def _take_bias(
    system: CausalSystem, rows: slice, kept: dict[int, Tensor], told: Any, where: tuple[int, int, int]
) -> None:
    """Put the biases of a block where the kernel finds them."""
    strict, own = system.block_bias(rows)
    strict = strict.expand(*(1,) * (4 - strict.dim()), *strict.shape).clone()
    diagonal = strict.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.zeros_like(diagonal) if own is None else own)
    kept[where[0]] = strict
    told[where[0]] = strict.data_ptr()
    told[where[1]] = 0 if strict.shape[0] == 1 else strict.stride(0)
    told[where[2]] = 0 if strict.shape[1] == 1 else strict.stride(1)


def _unit(t: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return t.detach() if t.stride(-1) == 1 else t.detach().contiguous()


def serves(system: CausalSystem) -> Any:
    """Return None if the kernels can compute this map, else what hinders them."""
    if system.key.device.type != "cpu":
        return f"the tensors are on {system.key.device}"
    if system.narrow not in (torch.float32, torch.float64):
        return f"the tensors are {system.narrow}"
    if system.spec.dropout:
        return "dropout is on"
    return None
