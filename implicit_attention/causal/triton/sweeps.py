"""Sweeps over blocks of many rows by Triton kernels.

A block that does not settle in `MOST_SWEEPS` is left unchanged, and the caller halves it. The next block may start
before the host reads whether the last one settled (`launches`). If that one did not settle, the whole solve is
repeated, with a read after each block (`Unsettled`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.call import FAR, contiguous
from implicit_attention.causal.triton.kernels import solved, sweep, sweep_adjoint
from implicit_attention.causal.triton.kernels.own_rows import ELSEWHERE, LOST
from implicit_attention.causal.triton.launches import FEW, MORE, Sweeps
from implicit_attention.causal.triton.own_columns import OwnColumns
from implicit_attention.causal.triton.own_rows import OwnRows, Settled
from implicit_attention.causal.triton.tiles import tiles_for
from implicit_attention.equilibrium.triton_available import interpreted

# Larger: a hard block loses more work before it is halved. Smaller: blocks that would settle are halved.
MOST_SWEEPS = 32
# Rows of the widest blocks, by the smallest length that has them. Wider blocks fill the device better and take fewer
# flash calls, but each sweep reads more columns.
WIDEST = ((8192, 512), (0, 256))
_LEAST_DIM, _MOST_DIM = 16, 256  # smallest tile of `tl.dot`; largest head whose tiles fit the shared memory
_GRID = 65536  # CUDA's limit of programs in the third dimension of a launch
# Sweeps that are launched together in the first rows of a sequence, which take the most: `launches.MORE` elsewhere.
_MANY = 16


def serves(system: CausalSystem) -> bool:
    """Return whether the kernels sweep over blocks of a map that the one-program kernels serve."""
    dim = system.dim
    whole = _LEAST_DIM <= dim <= _MOST_DIM and dim & (dim - 1) == 0
    known = whole and system.batch < _GRID and (interpreted() or system.wide == torch.float32)
    return known and tiles_for(system) is not None


def widest(length: int) -> int:
    """Return the rows of the blocks that are swept first.

    Args:
        length: N. Longer sequences hide the sweeps of wider blocks behind more attention.
    """
    return next(rows for least, rows in WIDEST if length >= least)


class ForwardSweeps(Sweeps):
    """Settles blocks in place."""

    def __init__(
        self, system: CausalSystem, into: dict[str, Tensor], rows: int, rtol: float, atol: float, *, cautious: bool
    ) -> None:
        """Prepare what all blocks share.

        Args:
            system: The map.
            into: As for `engine.ForwardKernel`.
            rows: Largest number of rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
            cautious: Whether to read each block's outcome before the next block.
        """
        super().__init__(system, rows, cautious)
        self.into, self.rtol, self.atol = into, rtol, atol
        batch, new = system.batch, system.key.new_empty
        self.narrow = new(batch * rows * system.heads * system.dim)
        self.lse = new(batch * system.heads * rows, dtype=system.wide)
        self.found = new(MOST_SWEEPS * 2 * batch * rows, dtype=self.bits)
        self.far = new(MOST_SWEEPS * batch * rows, dtype=torch.int32)
        self.bias, self.added = contiguous(system.bias), contiguous(system.added)
        query_map = system.function.query_map
        self.normed = {"eps": query_map.eps, "normed": query_map.normalize}
        self.inverse = into["inverse"] if query_map.normalize else None
        self.own_rows = OwnRows(self.call, self.weight)
        self.start: Tensor | None = None
        if system.self_score is None:
            self.start = new(batch, system.heads, system.length, dtype=system.wide)
            self._make_queries(self.call.value, self.call.value.stride()[:3], self.start, self.where, system.length, 0)

    def settle(self, rows: slice) -> bool:
        """Settle a block, or leave it unchanged.

        Args:
            rows: The block.

        Returns:
            Whether it settled, or is trusted to have settled until `check`.
        """
        biased, system, n = self.begin(rows), self.system, rows.stop - rows.start
        done, most = 0, min(_MANY if system.past + rows.start == 0 else self.at_once(), MOST_SWEEPS)
        while done < MOST_SWEEPS:
            self.launch(n, done, most, partial(self._sweep, n, biased))
            if self.goes_on(n):
                return True
            states, counts = self.judged.tolist()
            calm = most <= MORE and min(states) >= 0
            if -1 not in states and min(states) < -1:
                checked = self._check_roots(self._settled(rows, biased), counts, most)
                if checked is None:
                    return False
                if checked:
                    self._hand_over(n, True)
                    states = [-2 - state if state < -1 else state for state in states]
                else:
                    states = [-1]
            if min(states) >= 0:
                self.took(max(states) + 1, calm=calm)
                return True
            done, most = most, min(most + FEW, MOST_SWEEPS)
        return False

    def _sweep(self, n: int, biased: dict[str, Any], done: int, most: int) -> None:
        """Launch sweeps, find which samples settled, and store the results if all did."""
        system, into, tile = self.system, self.into, self.tiles.attended
        found = self.found[: MOST_SWEEPS * 2 * system.batch * n]
        far = self.far[: MOST_SWEEPS * system.batch * n]
        grid = self.by_tile(n, system.heads)
        judged = {"batch": system.batch, "rtol": self.rtol, "atol": self.atol}
        if done == 0:
            found.zero_()
            far.zero_()
            sweep.begin_rows[grid](
                into["y"], into["lse"], self.call.value, self.state, self.narrow, *self.call.value.stride()[:3],
                system.length, self.where, n, rows_=tile, **self.shape,
            )  # fmt: skip
        for at in range(done, most):
            self._make_queries(self.narrow, (0, 0, 0), None, self.where, n, at)
            sweep.attend_rows[grid](
                self.call.key, self.call.value, into["query"], self.call.given, start=self.start,
                before=into["y"], before_lse=into["lse"], state=self.state, narrow=self.narrow, lse=self.lse,
                found=found, far=far, sweep=at, too_far=FAR, rows_=tile, columns_=self.tiles.against,
                scale=system.spec.scale, length=system.length, where=self.where, n=n, **biased, **self.key_value,
                **judged, **self.shape, **self.types, **self.tiles.attends,
            )  # fmt: skip
        sweep.judge_rows[(system.batch,)](
            found, far, *self.judged.unbind(), n=n, sweeps=most, wide=self.types["wide"], **judged
        )
        self._hand_over(n, False)

    def _settled(self, rows: slice, biased: dict[str, Any]) -> Settled:
        """The block in its present state."""
        system, n = self.system, rows.stop - rows.start
        batch, heads, dim = system.batch, system.heads, system.dim
        return Settled(
            rows, self.where, biased, self.into["query"],
            state=self.state[: 2 * batch * n * heads * dim].view(2, batch, n, heads, dim),
            lse=self.lse[: batch * heads * n].view(batch, heads, n),
            far=self.far[: MOST_SWEEPS * batch * n].view(MOST_SWEEPS, batch, n),
            judged=self.judged,
        )  # fmt: skip

    def _hand_over(self, n: int, checked: bool) -> None:
        """Store the results if all samples settled; `checked` says that rows at possibly other roots were checked."""
        system, into = self.system, self.into
        sweep.hand_over_rows[self.by_tile(n, system.heads)](
            self.status, self.state, self.lse, self.found, into["y"], into["lse"], into["residual"], into["size"],
            into["sweeps"], batch=system.batch, length=system.length, where=self.where, n=n, heads=system.heads,
            dim=system.dim, rows_=self.tiles.attended, samples_=self.samples, wide=self.types["wide"],
            checked=checked,
        )  # fmt: skip

    def _check_roots(self, block: Settled, counts: list[int], most: int) -> bool | None:
        """Solve the row equations of marked rows in settled samples, and move rows that are at another root.

        Args:
            block: The block.
            counts: Number of marked rows of each sample.
            most: Sweeps that were launched.

        Returns:
            True if all rows are at their roots; False if some rows were moved to them, so that the sweeps have to go
            on; None if a row equation was not solved.
        """
        found = self.own_rows.solve(block, sum(counts))
        outcomes: list[int] = found.outcome.tolist()
        if LOST in outcomes:
            return None
        if ELSEWHERE not in outcomes:
            return True
        # Samples with such rows go on from F of their iterates, with these rows moved; the others stay unchanged.
        elsewhere = found.outcome == ELSEWHERE
        samples, positions = found.samples[elsewhere].long(), found.positions[elsewhere].long()
        again = torch.unique(samples)
        new = 1 - (-2 - block.judged[0, again]).long() % 2  # the half of `state` that holds F of the iterates
        f = block.state[new, again]
        y = torch.addcmul(found.a, found.root[..., None], found.way)[elsewhere]
        f[torch.searchsorted(again, samples), positions] = y
        block.state[:, again] = f
        shape = block.state.shape[1:]
        self.narrow[: shape.numel()].view(shape)[again] = f.to(self.system.narrow)
        residuals = self.found[: MOST_SWEEPS * 2 * shape[0] * shape[1]].view(MOST_SWEEPS, 2, *shape[:2])
        # An infinite residual in all sweeps so far: the sample counts as not settled in any of them.
        residuals[:most, 0, samples, positions] = f.new_full((), torch.inf).view(self.bits)
        return False

    def _make_queries(
        self, source: Tensor, strides: tuple[int, ...], start: Tensor | None, where: Tensor, n: int, at: int
    ) -> None:
        system, tiles = self.system, self.tiles
        sweep.make_queries[self.by_map(n, system.groups)](
            source, self.weight, self.bias, self.added, self.call.turn, self.call.key, self.into["query"],
            self.inverse, start, self.found, *strides, weight_o=self.weight.stride(0), batch=system.batch,
            length=system.length, where=where, n=n, sweep=at, rtol=self.rtol, atol=self.atol,
            scale=system.spec.scale, span=self.span, rows_=tiles.rows, depth=tiles.depth,
            **self.key_strides, **self.turned, **self.normed, **self.shape, **self.types, **tiles.queries,
        )  # fmt: skip


class AdjointSweeps(Sweeps):
    """Solves the adjoint of blocks in place."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, into: dict[str, Tensor | None],
        allowed: Tensor, rtol: float, rows: int, *, cautious: bool,
    ) -> None:  # fmt: skip
        """Prepare what all blocks share.

        Args:
            system: The map.
            at: The equilibrium, as for `engine.AdjointKernel`.
            grad: Cotangent, `[B, N, H, d]`.
            into: The tensors of the recursion by name: later `[B, N, G, d]`, the cotangents of the queries from rows
                after the block; lam `[B, N, H, d]`, which may share the memory of `later`; d_key and d_value, which are
                added to; made `[B, N, G d]`; and own `[B, H, N]` if own scores are given, else None.
            allowed: Tolerance per sample, `[B]`.
            rtol: Relative tolerance of rows whose solution is larger than the cotangent.
            rows: Largest number of rows of a block.
            cautious: Whether to read each block's outcome before the next block.
        """
        super().__init__(system, rows, cautious)
        self.at = {name: t.detach().contiguous() for name, t in at.items() if t.numel()}
        self.rtol = rtol
        self.grad, self.into, self.allowed = grad.detach().contiguous(), into, allowed.to(system.wide).contiguous()
        new, size = system.key.new_empty, system.batch * rows * system.heads
        self.narrow, self.delta = new(2 * size * system.dim), new(2 * size, dtype=system.wide)
        self.found = new(MOST_SWEEPS * 2 * system.batch * rows, dtype=self.bits)
        self.largest, self.latest = torch.zeros(2, system.batch, dtype=system.wide, device=grad.device).unbind()
        self.near_singular = 0

    def solve(self, rows: slice, *, exactly: bool) -> bool:
        """Solve a block, or leave it unchanged.

        Args:
            rows: The block.
            exactly: Whether to solve the own columns exactly. The first rows of a sequence need it most.

        Returns:
            Whether it was solved, or is trusted to have been solved until `check`.
        """
        biased, n = self.begin(rows), rows.stop - rows.start
        own = OwnColumns(self, rows) if exactly and self.call.given is None else None
        done, most = 0, min(self.at_once(), MOST_SWEEPS)
        while done < MOST_SWEEPS:
            sweep = partial(self._sweep, n, biased, own)
            if own is None:
                self.launch(n, done, most, sweep)
            else:
                sweep(done, most)
            if own is None and self.goes_on(n):
                return True
            states: list[int] = self.status.tolist()
            if min(states) >= 0:
                self.took(max(states) + 1, calm=most <= MORE)
                self.near_singular += 0 if own is None else own.finish()
                return True
            done, most = most, min(most + FEW, MOST_SWEEPS)
        return False

    def _sweep(self, n: int, biased: dict[str, Any], own: OwnColumns | None, done: int, most: int) -> None:
        """Launch sweeps, find which samples are solved, and store the results if all are."""
        system, call, at, into, tiles = self.system, self.call, self.at, self.into, self.tiles
        by_group, by_head = self.by_tile(n, system.groups), self.by_tile(n, system.heads)
        told = {"length": system.length, "where": self.where, "n": n, "batch": system.batch}
        given = call.given is not None
        common = {
            "key": call.key, "value": call.value, "query": at["query"], "lse": at["lse"], "narrow": self.narrow,
            "delta": self.delta, "scale": system.spec.scale, **biased, **self.key_value, **told, **self.shape,
            **self.types, **tiles.pulls,
        }  # fmt: skip
        by_columns = {"rows_": tiles.against, "columns_": tiles.attended}
        by_rows = {"rows_": tiles.attended, "columns_": tiles.against}
        found = self.found[: MOST_SWEEPS * 2 * system.batch * n]
        if done == 0:
            found.zero_()
            sweep_adjoint.begin_adjoint[by_head](
                self.grad, at["y"], self.state, self.narrow, self.delta, system.length, self.where, n, system.heads,
                system.dim, tiles.attended,
            )  # fmt: skip
        for i in range(done, most):
            sweep_adjoint.pull_queries[by_group](
                inverse=at.get("inverse"), turn=call.turn, later=into["later"], made=into["made"], found=self.found,
                allowed=self.allowed, rtol=self.rtol, sweep=i, strictly=given or own is not None, **self.turned,
                **common, **by_columns,
            )  # fmt: skip
            if own is None:
                self.through_map(into["made"], self.grad, at["y"], self.state, self.narrow, i, True, told)
            else:
                own.solve(i)
        solved.judge_adjoint[(system.batch,)](
            self.found, self.allowed, self.status, self.latest, system.batch, n, most, self.rtol, self.types["wide"]
        )
        sweep_adjoint.pull_values[by_group](
            given=call.given, d_value=into["d_value"], own=into["own"], status=self.status, samples_=self.samples,
            **common, **by_columns,
        )  # fmt: skip
        sweep_adjoint.pull_keys[by_head](
            state=self.state, d_key=into["d_key"], lam=into["lam"], status=self.status, latest=self.latest,
            largest=self.largest, strictly=given, samples_=self.samples, **common, **by_rows,
        )  # fmt: skip

    def through_map(
        self, made: Tensor | None, grad: Tensor, y: Tensor, state: Tensor, narrow: Tensor | None, at: int,
        raises: bool, told: dict[str, Any],
    ) -> None:  # fmt: skip
        """Launch the kernel of that name.

        Args:
            made: As in the kernel, like the next four.
            grad: `[B, N, H, d]`.
            y: `[B, N, H, d]`.
            state: `[2, B, n, H, d]`.
            narrow: `[2, B, n, H, d]` or None.
            at: The sweep.
            raises: Whether the kernel records residuals.
            told: Batch, length, first row and number of rows.
        """
        system, tiles = self.system, self.tiles
        sweep_adjoint.through_map[self.by_map(told["n"], system.heads)](
            made, self.weight, grad, y, state, narrow, self.delta, self.found, self.allowed, self.weight.stride(0),
            sweep=at, rtol=self.rtol, raises=raises, span=self.span, rows_=tiles.rows, depth=tiles.depth, **told,
            **self.shape, **self.types, **tiles.queries,
        )  # fmt: skip
