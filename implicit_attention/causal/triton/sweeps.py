"""Sweeps over blocks of many rows by Triton kernels.

A block that does not settle in `MOST_SWEEPS` is left unchanged, and the caller halves it. While blocks settle quickly,
the host does not wait for the device: the sweeps of a block are one CUDA graph, and the host starts the next block
before it reads whether the last one settled. If that one did not settle, the whole solve is repeated, with a read after
each block (`Unsettled`).
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from implicit_attention.causal.diagonal import Unsettled
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.call import FAR, TYPES, Call, contiguous
from implicit_attention.causal.triton.kernels import solved, sweep, sweep_adjoint
from implicit_attention.causal.triton.kernels.own_rows import ELSEWHERE, LOST
from implicit_attention.causal.triton.own_columns import OwnColumns
from implicit_attention.causal.triton.own_rows import OwnRows, Settled
from implicit_attention.causal.triton.tiles import tiles_for
from implicit_attention.equilibrium.triton_available import interpreted

MOST_SWEEPS = (
    32  # larger: a hard block loses more work before it is halved; smaller: blocks that would settle are halved
)
# Rows of the widest blocks, by the smallest length that has them. Wider blocks fill the device better and take fewer
# flash calls, but each sweep reads more columns.
WIDEST = ((8192, 512), (0, 256))
_LEAST_DIM, _MOST_DIM = 16, 256  # smallest tile of `tl.dot`; largest head whose tiles fit the shared memory
_GRID = 65536  # CUDA's limit of programs in the third dimension of a launch
_REPEATED = 4  # whole blocks from which on capturing a graph costs less than the launches that it saves
# Sweeps that are launched together: after blocks that settled in half of `_FEW`; usually; in the first rows of a
# sequence. Larger: more idle launches after a block has settled. Smaller: the host waits for the device more often.
_FEW, _MORE, _MANY = 4, 8, 16
# Sweeps of a block after which the next block is trusted to settle within `_MORE`. Larger: fewer waits, but each wrong
# trust repeats a whole solve.
_SURE = 5


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


class _Side(threading.local):
    """Streams on which a thread captures, by device.

    PyTorch deals out the same 32 streams to all of a process. A new one for each capture would soon be one on which
    another thread works, whose launches would be captured, too.
    """

    def __init__(self) -> None:
        self.streams: dict[int, torch.cuda.Stream] = {}

    def stream(self) -> torch.cuda.Stream:
        """The stream of this thread on the current device."""
        device = torch.cuda.current_device()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.streams[device]


_SIDE = _Side()


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture launches as a CUDA graph, without launching them and without waiting for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_SIDE.stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph


class _Wary:
    """Number of solves that still read each block before the next, after a repeated solve. Results are the same."""

    AFTER = 64  # solves: a repeated solve costs one, so at most one in 65 is lost where blocks are unsure
    solves = 0


class _Sweeps:
    """State and launches that both directions share."""

    def __init__(self, system: CausalSystem, rows: int, cautious: bool) -> None:
        tiles = tiles_for(system)
        assert tiles is not None, "asked for where `serves` is not true"
        self.system, self.call, self.tiles, self.rows = system, Call(system), tiles, rows
        size, device = system.batch * rows * system.heads * system.dim, system.key.device
        weight = self.call.weight  # None if the key has absorbed it; then the kernels multiply by the identity
        self.weight = torch.eye(system.dim, dtype=system.narrow, device=device) if weight is None else weight
        self.span = max(1, self.tiles.width // system.dim)
        self.state = system.key.new_empty(2 * size, dtype=system.wide)
        self.judged = torch.empty(2, system.batch, dtype=torch.int32, device=device)
        self.status = self.judged[0]
        self.where = torch.zeros(1, dtype=torch.int32, device=device)
        self.bits = torch.int64 if system.wide == torch.float64 else torch.int32
        self.samples = int(triton.next_power_of_2(system.batch))
        strides = self.call.strides()
        self.key_strides = {name: at for name, at in strides.items() if name.startswith("key_")}
        self.key_value = self.key_strides | {name: at for name, at in strides.items() if name.startswith("value_")}
        self.turned = {name: at for name, at in strides.items() if name.startswith("turn_")}
        self.shape = {"heads": system.heads, "groups": system.groups, "dim": system.dim}
        self.types = {
            "wide": TYPES[system.wide], "operand": self.call.operand, "precision": self.call.precision,
        }  # fmt: skip
        # A graph holds addresses, and those of biases change from block to block: graphs without biases only.
        self.graphed = device.type == "cuda" and system.spec.plain
        self.repeats = self.graphed and system.length >= _REPEATED * rows
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of sweeps
        self.calm, self.hopeful = False, self.graphed and not cautious and _Wary.solves == 0
        _Wary.solves = max(0, _Wary.solves - 1)
        self.guess = self.sweeps = 0
        self.host = torch.empty(system.batch, dtype=torch.int32, device="cpu", pin_memory=self.hopeful)
        self.looked: torch.cuda.Event | None = None

    def launch(self, n: int, done: int, most: int, sweep: Callable[[int, int], None]) -> None:
        """Launch the sweeps `done` to `most` of a block; those of a whole block from its start by a CUDA graph.

        Args:
            n: Rows of the block.
            done: First sweep.
            most: End of the sweeps.
            sweep: Launches the sweeps of a range.
        """
        if (n, done) == (self.rows, 0) and most in self.graphs:
            self.graphs[most].replay()
            return
        sweep(done, most)
        if self.repeats and n == self.rows and not self.graphs:  # captured while the device works on the first block
            try:
                self.graphs = {count: _captured(partial(sweep, 0, count)) for count in (_FEW, _MORE)}
            except RuntimeError:  # another thread disturbed the capture: launches do the same
                self.repeats = False

    def begin(self, rows: slice) -> dict[str, Any]:
        """Check the last block, go to the next, and return its biases as keyword arguments of kernels."""
        self.check()
        self.where.fill_(rows.start)
        strict, strict_b, strict_h = self.system.compiled_bias(rows) or (None, 0, 0)
        return {"strict": strict, "strict_b": strict_b, "strict_h": strict_h}

    def goes_on(self, n: int) -> bool:
        """Whether to start the next block before reading if this one settled; if so, start copying its status."""
        if not (self.hopeful and self.calm and self.guess <= _SURE and n == self.rows):
            return False
        self.host.copy_(self.status, non_blocking=True)
        self.looked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.looked.record()
        return True

    def check(self) -> None:
        """Read whether the last block settled, if that has not been read yet.

        Raises:
            Unsettled: If it did not settle although the next block was started.
        """
        if self.looked is None:
            return
        self.looked.synchronize()
        self.looked = None
        states: list[int] = self.host.tolist()
        if min(states) < 0:
            _Wary.solves = _Wary.AFTER
            raise Unsettled
        self.took(max(states) + 1, calm=True)

    def took(self, sweeps: int, *, calm: bool) -> None:
        """Record the sweeps of a settled block."""
        self.guess, self.sweeps, self.calm = sweeps, max(self.sweeps, sweeps), calm

    def at_once(self) -> int:
        """The number of sweeps to launch before the host reads."""
        return _FEW if 0 < self.guess <= _FEW // 2 else _MORE

    def by_map(self, n: int, out: int) -> tuple[int, int, int]:
        """The grid of a product with Omega_Q that has `out` heads as its output."""
        return triton.cdiv(n, self.tiles.rows), triton.cdiv(out, self.span), self.system.batch

    def by_tile(self, n: int, heads: int) -> tuple[int, int, int]:
        """The grid of an attention kernel."""
        return triton.cdiv(n, self.tiles.attended), heads, self.system.batch


class ForwardSweeps(_Sweeps):
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
            calm = most <= _MORE and min(states) >= 0
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
            done, most = most, min(most + _FEW, MOST_SWEEPS)
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


class AdjointSweeps(_Sweeps):
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
                self.took(max(states) + 1, calm=most <= _MORE)
                self.near_singular += 0 if own is None else own.finish()
                return True
            done, most = most, min(most + _FEW, MOST_SWEEPS)
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
