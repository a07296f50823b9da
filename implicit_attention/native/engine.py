"""What calls the compiled kernels: which calls they serve, what they are told, and their scratch."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.causal_system import CausalSystem
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
        numbers = [system.spec.scale, system.function.query_map.eps, rtol, atol, 0.0, 1.0, torch.inf, 1.0 / d, k.FAR, 1e-2, 0.5]
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
            self._take_bias(rows)
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

    def _take_bias(self, rows: slice) -> None:
        strict, own = self.system.block_bias(rows)
        strict = strict.expand(*(1,) * (4 - strict.dim()), *strict.shape).clone()
        diagonal = strict.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.zeros_like(diagonal) if own is None else own)
        self.kept[k.STRICT] = strict
        self.told[k.STRICT] = strict.data_ptr()
        self.told[k.STRICT_B] = 0 if strict.shape[0] == 1 else strict.stride(0)
        self.told[k.STRICT_H] = 0 if strict.shape[1] == 1 else strict.stride(1)


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
