"""Row equations of marked rows in a block that sweeps have settled, by Triton kernels."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from implicit_attention.attention.map import by_read_head
from implicit_attention.causal.own_roots import SAME_ROOT
from implicit_attention.causal.triton.call import AT_ONCE, TYPES, Call
from implicit_attention.causal.triton.kernels import own_rows
from implicit_attention.causal.triton.tiles import padded
from implicit_attention.causal.triton.token import solve_rows


class Settled(NamedTuple):
    """A block after its sweeps.

    Attributes:
        rows: The block.
        where: Its first row, on the device.
        biased: Its biases, as keyword arguments of kernels.
        query: Queries of the whole sequence, `[B, N, G, d]`.
        state: Iterates, `[2, B, n, H, d]`.
        lse: Log-sum-exp, `[B, H, n]`.
        far: Marked rows by sweep, `[sweeps, B, n]`.
        judged: Results of `judge_rows`, `[2, B]`: states, and numbers of marked rows.
    """

    rows: slice
    where: Tensor
    biased: dict[str, Any]
    query: Tensor
    state: Tensor
    lse: Tensor
    far: Tensor
    judged: Tensor


class Roots(NamedTuple):
    """The roots of R rows that iteration from y = v reaches.

    Attributes:
        samples: `[R]`, int32.
        positions: Rows of the block, `[R]`, int32.
        a: Attention to all other columns, `[R, H, d]`.
        way: Value minus a, `[R, H, d]`.
        root: Weights on the own column, `[R, H]`.
        outcome: `[R]`, int32: SAME if the sweeps ended at this root, ELSEWHERE if not, LOST if no root was found.
    """

    samples: Tensor
    positions: Tensor
    a: Tensor
    way: Tensor
    root: Tensor
    outcome: Tensor


class OwnRows:
    """Solves the row equations of marked rows."""

    def __init__(self, call: Call, weight: Tensor) -> None:
        """Keep the map.

        Args:
            call: The map's arguments for kernels.
            weight: Omega_Q, `[G d, H d]`.
        """
        self.call, self.weight, system = call, weight, call.system
        strides = call.strides()
        self.strides = {name: at for name, at in strides.items() if name != "weight_o"}
        query_map = system.function.query_map
        self.eps = query_map.eps if query_map.normalize else None
        self.least = torch.finfo(system.wide).eps

    def solve(self, block: Settled, count: int) -> Roots:
        """Solve the row equations of the marked rows in settled samples.

        Args:
            block: The block.
            count: Number of these rows.

        Returns:
            Their roots.
        """
        system, call, (status, counts) = self.call.system, self.call, block.judged.unbind()
        batch, heads, dim, n = system.batch, system.heads, system.dim, block.rows.stop - block.rows.start
        new = block.state.new_empty
        listed, outcome = status.new_empty(2, count), status.new_empty(count)
        keys, ends = new(count, heads, dim), new(2, count, heads, dim)
        sums, weights = new(count, heads), new(count, heads)
        own_rows.list_rows[(batch,)](
            block.far, status, counts, listed, batch, n, count, int(triton.next_power_of_2(batch))
        )  # fmt: skip
        own_rows.own_equations[(count, heads)](
            listed, status, call.key, call.value, block.query, turn=call.turn, state=block.state, lse=block.lse,
            keys=keys, ends=ends, sums=sums, weights=weights, batch=batch, length=system.length, where=block.where,
            n=n, count=count, scale=system.spec.scale, least=self.least, heads=heads, groups=system.groups, dim=dim,
            wide=TYPES[system.wide], **block.biased, **self.strides, num_warps=1,
        )  # fmt: skip
        samples, positions = listed.unbind()
        root, moved = self._roots(keys, ends, sums, self._fixed(samples, block.rows.start + positions))
        own_rows.compare_roots[(count,)](
            weights, root, moved, outcome, SAME_ROOT, heads, padded(heads), num_warps=1
        )  # fmt: skip
        a, way = ends.unbind()
        return Roots(samples, positions, a, way, root, outcome)

    def _roots(self, keys: Tensor, ends: Tensor, sums: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Roots and their residuals, `[R, H]` each, some rows at a time to bound the memory."""
        system, count = self.call.system, len(keys)
        by_head = by_read_head(self.weight, system.heads)
        few, found = max(1, AT_ONCE // (2 * system.heads * system.groups * system.dim)), []
        for low in range(0, count, few):
            some = slice(low, low + few)
            added = fixed[some] if fixed is not None and len(fixed) > 1 else fixed
            found.append(solve_rows(keys[some], ends[:, some].flatten(0, 1), sums[some], by_head, added, self.eps))
        root, moved = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
        return root, moved

    def _fixed(self, samples: Tensor, places: Tensor) -> Tensor | None:
        """The part of the queries that does not depend on the outputs, `[1 or R, G d]`, or None."""
        system = self.call.system
        fixed = None if system.bias is None else system.bias.to(system.wide)[None]
        if system.added is None:
            return fixed
        own = system.added[samples, places].to(system.wide)
        return own if fixed is None else own + fixed
