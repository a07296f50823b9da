"""The engine of the Triton kernels with one program per sample: it allocates, launches, and reads the results."""

import math

import torch
import triton
from torch import Tensor

from implicit_attention.causal.diagonal import SLOW, hand_back
from implicit_attention.causal.diagonal_adjoint import NEAR_SINGULAR, BlockAdjoint, near_singular
from implicit_attention.causal.own_roots import SAME_ROOT
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.call import FAR, Call, contiguous, rows_contiguous
from implicit_attention.causal.triton.kernels import adjoint, forward, merge
from implicit_attention.causal.triton.kernels.tiles import LAUNCH

KEEPS_SLOPES = False  # no cotangents of scores for the gradients of biases


def widest(system: CausalSystem, block: int) -> int:
    """Return how many rows one call should take; wider blocks are swept over (`sweeps`)."""
    return block


class ForwardKernel:
    """Settles diagonal blocks in place."""

    def __init__(self, system: CausalSystem, into: dict[str, Tensor], block: int, rtol: float, atol: float) -> None:
        """Prepare what all blocks share.

        Args:
            system: The map.
            into: The tensors of the recursion by name. y `[B, N, H, d]` and lse `[B, H, N]` hold attention over the
                columns before the block; query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a norm),
                residual, size and sweeps `[B, N]` are filled.
            block: Largest number of rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        self.system, self.into, self.call = system, into, Call(system)
        batch, heads, y = system.batch, system.heads, into["y"]
        self.slot = forward.scratch_size(heads, system.groups, self.call.dp, self.call.hp)
        self.work = y.new_empty(batch, self.slot)
        self.before_y = y.new_empty(batch * block * heads * system.dim)
        self.before_lse = y.new_empty(batch * heads * block)
        self.status = torch.zeros(batch, dtype=torch.long, device=y.device)
        query_map = system.function.query_map
        self.told = {
            "rtol": rtol, "atol": atol, "far": FAR, "same_root": SAME_ROOT, "slow_ratio": SLOW, "length": system.length,
            "slot": self.slot, "eps": query_map.eps, "normed": query_map.normalize,
            **self.call.strides(), **self.call.sizes(),
        }  # fmt: skip

    def settle(self, rows: slice) -> int:
        """Settle rows of a block up to the first that the kernel gives up on; later rows are unchanged.

        Args:
            rows: The block.

        Returns:
            The first row that is not settled; the end of the block if all are.
        """
        system, call, into, n = self.system, self.call, self.into, rows.stop - rows.start
        strict, strict_b, strict_h = system.compiled_bias(rows) or (None, 0, 0)
        forward.settle_block[(system.batch,)](
            call.key, call.value, call.weight, contiguous(system.bias), contiguous(system.added), call.turn,
            call.given, strict, into["y"], into["lse"], into["query"],
            into["inverse"] if into["inverse"].numel() else None,
            into["residual"], into["size"], into["sweeps"], self.before_y, self.before_lse, self.status, self.work,
            strict_b=strict_b, strict_h=strict_h, first=rows.start, n=n, **self.told, **LAUNCH,
        )  # fmt: skip
        done: list[int] = self.status.tolist()
        y = self.before_y[: system.batch * n * system.heads * system.dim]
        lse = self.before_lse[: system.batch * system.heads * n].view(system.batch, system.heads, n)
        return hand_back(into, y.view(system.batch, n, system.heads, system.dim), lse, rows, done)

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge attention over more columns into `y` and `lse`, in one launch.

        Args:
            rows: The rows.
            out: Their attention over those columns, `[B, H, r, d]`.
            lse: Its log-sum-exp, `[B, H, r]`.
        """
        system, count = self.system, rows.stop - rows.start
        out, lse = rows_contiguous(out), rows_contiguous(lse)
        merge.merge_rows[(system.batch * system.heads, triton.cdiv(count, merge.MERGED))](
            self.into["y"], self.into["lse"], out, lse, *out.stride()[:3], *lse.stride()[:2], system.length,
            rows.start, count, system.heads, system.dim, self.call.dp, merge.MERGED,
        )  # fmt: skip


class AdjointKernel:
    """Solves the adjoint of diagonal blocks."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, later: Tensor, allowed: Tensor, block: int,
        *, slopes: bool = False,
    ) -> None:  # fmt: skip
        """Prepare what all blocks share.

        Args:
            system: The map, as for `ForwardKernel`.
            at: The equilibrium: y `[B, N, H, d]`, query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a
                norm), lse `[B, H, N]`.
            grad: Cotangent, `[B, N, H, d]`.
            later: Cotangent of the queries from rows after the block, `[B, N, G, d]`; the caller keeps it.
            allowed: Tolerance per sample, `[B]`.
            block: Largest number of rows of a block.
            slopes: Not kept: False.
        """
        self.system, self.call, self.later, self.block = system, Call(system), later, block
        self.at = {name: t.detach().contiguous() for name, t in at.items() if t.numel()}
        self.grad, self.allowed = grad.detach().contiguous(), allowed.to(system.wide).contiguous()
        batch, heads, groups = system.batch, system.heads, system.groups
        slot = adjoint.scratch_size(heads, groups, self.call.dp, self.call.hp)
        new = later.new_empty
        self.work = new(batch, slot)
        wide, narrow = heads * system.dim, groups * system.dim
        sizes = {"lam": wide, "d_made": narrow, "d_key": wide, "d_value": narrow, "own": heads, "gain": heads**2}
        self.found = {name: new(batch * block * size) for name, size in sizes.items()}
        self.residual, counts = new(batch), new(batch, dtype=torch.int32)
        self.sweeps, self.status = torch.zeros_like(counts), torch.zeros_like(counts)
        self.suspect = counts.new_zeros(batch * block)
        self.told = {
            "length": system.length, "slot": slot, "near_singular": NEAR_SINGULAR,
            **self.call.strides(), **self.call.sizes(),
        }  # fmt: skip

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve a block; return None if the kernel gives up on one of its rows.

        Args:
            rows: The block.

        Returns:
            The solution, in buffers that the next call overwrites; `slope` holds the diagonal only, `[B, H, n, 1]`.
        """
        system, call, at, found, n = self.system, self.call, self.at, self.found, rows.stop - rows.start
        batch, heads, groups, d = system.batch, system.heads, system.groups, system.dim
        strict, strict_b, strict_h = system.compiled_bias(rows) or (None, 0, 0)
        self.suspect.zero_()
        adjoint.solve_block[(batch,)](
            call.key, call.value, call.weight, call.turn, call.given, strict, at["y"], at["query"], at.get("inverse"),
            at["lse"], self.grad, self.later, self.allowed, found["lam"], found["d_made"], found["d_key"],
            found["d_value"], found["own"], self.residual, self.sweeps, self.suspect, found["gain"], self.status,
            self.work, strict_b=strict_b, strict_h=strict_h, first=rows.start, n=n, **self.told, **LAUNCH,
        )  # fmt: skip
        solved, sweeps = torch.stack([self.status.amin(), self.sweeps.amax()]).tolist()
        if not solved:
            return None

        def part(name: str, *shape: int) -> Tensor:
            return found[name][: math.prod(shape)].view(shape)

        suspects = self.suspect[: batch * n] > 0
        return BlockAdjoint(
            lam=part("lam", batch, n, heads, d),
            d_made=part("d_made", batch, n, groups * d),
            d_key=part("d_key", batch, heads, n, d),
            d_value=part("d_value", batch, groups, n, d),
            slope=part("own", batch, heads, n, 1),
            residual=self.residual.clone(),
            sweeps=sweeps,
            near_singular=near_singular(part("gain", batch * n, heads, heads)[suspects]),
        )
