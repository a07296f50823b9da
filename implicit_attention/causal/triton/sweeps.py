"""What calls the Triton kernels that sweep over blocks of many rows, and when a block is left to others.

A block is swept while its sweeps contract; one that does not settle is left as it was. The host is not waited for while
blocks are calm: their launches are one CUDA graph, and a look at the device says of the block before whether it has
settled. If it has not, all is done again with a look at each block (`Unsettled`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from implicit_attention.causal.diagonal import FAR, NEAR_SINGULAR, Unsettled, near_singular, own_jacobian
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.causal.triton.call import AT_ONCE, TYPES, Call, contiguous
from implicit_attention.causal.triton.kernels import sweep, sweep_adjoint
from implicit_attention.causal.triton.kernels.own_rows import ELSEWHERE, LOST
from implicit_attention.causal.triton.own_rows import OwnRows, Settled
from implicit_attention.triton_available import interpreted

MOST_SWEEPS = 32
WIDEST = ((8192, 512), (0, 256))  # rows of the widest blocks, by the least length that has them
_LEAST_DIM, _MOST_DIM = 16, 256
_NARROW_DIM = 64
_SPARE = 10 * 1024  # bytes of shared memory that a program takes beside its tiles, at most
_GRID = 65536  # programs in the third dimension of a launch
_REPEATED = 4  # whole blocks from which on a graph pays
# Sweeps that are launched together: where blocks settle in half as many, elsewhere, and in the first rows of all.
_FEW, _MORE, _MANY = 4, 8, 16
_SURE = 5  # sweeps of a block whose successor is trusted to settle in `_MORE`: to be wrong costs as much as a solve


@dataclass(frozen=True)
class _Tiles:
    """Sizes of the tiles of the kernels.

    Attributes:
        rows: Rows of a program that multiplies by Omega_Q.
        width: Outputs of such a program, at least a head's.
        depth: What such a program multiplies together.
        queries: Launch options of such a program.
        attended: Rows of a program of attention; columns, where it is one of columns.
        against: Columns, or rows, that it takes together; divides the former.
        attends: Launch options of such a program.
        pulls: Launch options of a program of the adjoint's attention.
    """

    rows: int
    width: int
    depth: int
    queries: dict[str, int]
    attended: int
    against: int
    attends: dict[str, int]
    pulls: dict[str, int]


def _tiles(system: CausalSystem) -> _Tiles | None:
    """The tiles for a map, None if a multiprocessor's shared memory does not hold them."""
    if interpreted():
        one = {"num_warps": 1, "num_stages": 1}
        return _Tiles(rows=16, width=32, depth=16, queries=one, attended=32, against=16, attends=one, pulls=one)
    half, dim, size = system.narrow != system.wide, system.dim, system.narrow.itemsize
    rows, depth, tile = (128, 64, 64) if half else (64, 32, 32)
    width = max(rows, dim)
    device: Any = torch.cuda.get_device_properties(system.key.device)
    room = device.shared_memory_per_block_optin - _SPARE
    by_map = min(3 if half else 2, room // ((rows + width) * depth * size))
    # Two tiles of the program's own, as many of each stage, and biases; two programs are worth a stage.
    tiles, biases = 2 * tile * dim * size, 0 if system.spec.plain else tile * tile * system.wide.itemsize
    by_tile = min((3 if dim <= _NARROW_DIM else 2) if half else 1, (room - tiles) // (tiles + biases))
    if min(by_map, by_tile) < 1:
        return None
    queries = {"num_warps": 8 if half else 4, "num_stages": by_map}
    attends = {"num_warps": 4 if dim <= 128 else 8, "num_stages": by_tile}
    pulls = dict(attends)
    if half and width <= rows:  # registers of a thread: two programs to a multiprocessor
        queries["maxnreg"] = 128
    if half and dim <= _NARROW_DIM:  # four
        attends["maxnreg"] = 128
    if half and dim <= _NARROW_DIM and system.groups == system.heads:  # three
        pulls["maxnreg"] = 168
    return _Tiles(
        rows=rows, width=width, depth=depth, queries=queries, attended=tile, against=tile, attends=attends, pulls=pulls
    )


def serves(system: CausalSystem) -> bool:
    """Return whether the kernels can sweep over blocks of a map that Triton's other kernels serve."""
    dim = system.dim
    whole = _LEAST_DIM <= dim <= _MOST_DIM and dim & (dim - 1) == 0
    known = whole and system.batch < _GRID and (interpreted() or system.wide == torch.float32)
    return known and _tiles(system) is not None


def widest(length: int) -> int:
    """Return the rows of the blocks that are swept first, of a sequence of so many: a longer one has more to hide in.

    Args:
        length: N.
    """
    return next(rows for least, rows in WIDEST if length >= least)


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Launches as a graph; nothing is launched, and nothing waited for."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph


class _Wary:
    """Solves that still look at each block before the next, since one has been done twice; of no matter for results."""

    AFTER = 64
    solves = 0


class _Sweeps:
    """What both directions need to know of a map."""

    def __init__(self, system: CausalSystem, rows: int, cautious: bool) -> None:
        tiles = _tiles(system)
        assert tiles is not None, "asked for where `serves` is not true"
        self.system, self.call, self.tiles, self.rows = system, Call(system), tiles, rows
        size, device = system.batch * rows * system.heads * system.dim, system.key.device
        weight = self.call.weight  # None: the key has absorbed it
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
        # A graph holds the addresses of a block's biases, which change from block to block.
        self.graphed = device.type == "cuda" and system.spec.plain and not torch.cuda.is_current_stream_capturing()
        self.repeats = self.graphed and system.length >= _REPEATED * rows
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of sweeps
        self.calm, self.hopeful = False, self.graphed and not cautious and _Wary.solves == 0
        _Wary.solves = max(0, _Wary.solves - 1)
        self.guess = self.sweeps = 0
        self.host = torch.empty(system.batch, dtype=torch.int32, device="cpu", pin_memory=self.hopeful)
        self.looked: torch.cuda.Event | None = None

    def launch(self, n: int, done: int, most: int, sweep: Callable[[int, int], None]) -> None:
        """Sweep a block: whole ones from their start by a CUDA graph, once its kernels have been compiled.

        Args:
            n: Rows of the block.
            done: Sweeps before.
            most: Sweeps after.
            sweep: What launches those from the one to the other.
        """
        if (n, done) == (self.rows, 0) and most in self.graphs:
            self.graphs[most].replay()
            return
        sweep(done, most)
        if self.repeats and n == self.rows and not self.graphs:  # while the device is at work on the first block
            self.graphs = {count: _captured(partial(sweep, 0, count)) for count in (_FEW, _MORE)}

    def begin(self, rows: slice) -> dict[str, Any]:
        """Look at the block before, go to the next, and return its biases as they are told to kernels."""
        self.check()
        self.where.fill_(rows.start)
        strict, strict_b, strict_h = self.system.compiled_bias(rows) or (None, 0, 0)
        return {"strict": strict, "strict_b": strict_b, "strict_h": strict_h}

    def goes_on(self, n: int) -> bool:
        """Whether to go on to the next block before it is known that this one has settled; if so, prepare the look."""
        if not (self.hopeful and self.calm and self.guess <= _SURE and n == self.rows):
            return False
        self.host.copy_(self.status, non_blocking=True)
        self.looked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.looked.record()
        return True

    def check(self) -> None:
        """Look at the block before.

        Raises:
            Unsettled: If it had not settled when its successor was begun.
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
        """Remember how a block settled."""
        self.guess, self.sweeps, self.calm = sweeps, max(self.sweeps, sweeps), calm

    def at_once(self) -> int:
        """Sweeps to launch before a look."""
        return _FEW if 0 < self.guess <= _FEW // 2 else _MORE

    def by_map(self, n: int, out: int) -> tuple[int, int, int]:
        """Programs that multiply by Omega_Q, for so many heads' worth of outputs."""
        return triton.cdiv(n, self.tiles.rows), triton.cdiv(out, self.span), self.system.batch

    def by_tile(self, n: int, heads: int) -> tuple[int, int, int]:
        """Programs that attend."""
        return triton.cdiv(n, self.tiles.attended), heads, self.system.batch


class ForwardSweeps(_Sweeps):
    """Settles blocks in place."""

    def __init__(
        self, system: CausalSystem, into: dict[str, Tensor], rows: int, rtol: float, atol: float, *, cautious: bool
    ) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            into: As for `engine.ForwardKernel`.
            rows: The most rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
            cautious: Whether to look at each block before the next.
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
        """Settle a block, or leave it as it was.

        Args:
            rows: The block.

        Returns:
            Whether it has been settled, as far as is known.
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
        """Sweep a block on, see which samples have settled, and hand them over if all have."""
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
        """The block as it is now."""
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
        """Hand over what has settled, and where rows may be at other roots what has been `checked`, if all has."""
        system, into = self.system, self.into
        sweep.hand_over_rows[self.by_tile(n, system.heads)](
            self.status, self.state, self.lse, self.found, into["y"], into["lse"], into["residual"], into["size"],
            into["sweeps"], batch=system.batch, length=system.length, where=self.where, n=n, heads=system.heads,
            dim=system.dim, rows_=self.tiles.attended, samples_=self.samples, wide=self.types["wide"],
            checked=checked,
        )  # fmt: skip

    def _check_roots(self, block: Settled, counts: list[int], most: int) -> bool | None:
        """Solve the own equations of rows that are far from where they started, in samples that have settled.

        Args:
            block: The block.
            counts: How many such rows each sample has.
            most: Sweeps that were launched.

        Returns:
            True if these samples are at the roots that are wanted; False if some rows were not, which have been taken
            there, so that their samples have to be swept on; None if an equation was not solved.
        """
        found = self.own_rows.solve(block, sum(counts))
        outcomes: list[int] = found.outcome.tolist()
        if LOST in outcomes:
            return None
        if ELSEWHERE not in outcomes:
            return True
        # Samples with such rows have settled at no sweep so far; the others stay where they are.
        elsewhere = found.outcome == ELSEWHERE
        samples, positions = found.samples[elsewhere].long(), found.positions[elsewhere].long()
        again = torch.unique(samples)
        new = 1 - (-2 - block.judged[0, again]).long() % 2  # where F of the iterates is
        f = block.state[new, again]
        y = torch.addcmul(found.a, found.root[..., None], found.way)[elsewhere]
        f[torch.searchsorted(again, samples), positions] = y
        block.state[:, again] = f
        shape = block.state.shape[1:]
        self.narrow[: shape.numel()].view(shape)[again] = f.to(self.system.narrow)
        residuals = self.found[: MOST_SWEEPS * 2 * shape[0] * shape[1]].view(MOST_SWEEPS, 2, *shape[:2])
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
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            at: The equilibrium, as for `engine.AdjointKernel`.
            grad: Cotangent, `[B, N, H, d]`.
            into: The tensors of the recursion by name: later `[B, N, G, d]`, the cotangents of the queries from rows
                after the block; lam `[B, N, H, d]`, whose storage may be that of `later`; d_key and d_value, which are
                added to; made `[B, N, G d]`; and own `[B, H, N]` where own scores are given, else None.
            allowed: Tolerance per sample, `[B]`.
            rtol: Relative tolerance of rows whose solution is larger than the cotangent.
            rows: The most rows of a block.
            cautious: Whether to look at each block before the next.
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
        """Solve a block, or leave it as it was.

        Args:
            rows: The block.
            exactly: Whether the rows' own columns are solved for, of which early rows have heavy ones.

        Returns:
            Whether it has been solved, as far as is known.
        """
        biased, n = self.begin(rows), rows.stop - rows.start
        own = _OwnColumns(self, rows) if exactly and self.call.given is None else None
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

    def _sweep(self, n: int, biased: dict[str, Any], own: "_OwnColumns | None", done: int, most: int) -> None:
        """Sweep a block on, see which samples are solved, and hand them over if all are."""
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
        sweep_adjoint.judge_adjoint[(system.batch,)](
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
            made: As there, as are those that follow.
            grad: `[B, N, H, d]`.
            y: `[B, N, H, d]`.
            state: `[2, B, n, H, d]`.
            narrow: `[2, B, n, H, d]` or None.
            at: The sweep.
            raises: Whether residuals are found.
            told: Batch, length, first row and rows.
        """
        system, tiles = self.system, self.tiles
        sweep_adjoint.through_map[self.by_map(told["n"], system.heads)](
            made, self.weight, grad, y, state, narrow, self.delta, self.found, self.allowed, self.weight.stride(0),
            sweep=at, rtol=self.rtol, raises=raises, span=self.span, rows_=tiles.rows, depth=tiles.depth, **told,
            **self.shape, **self.types, **tiles.queries,
        )  # fmt: skip


class _OwnColumns:
    """The rows' own columns, of rank one per head, solved for exactly in every sweep; see `diagonal._OwnColumns`."""

    def __init__(self, sweeps: AdjointSweeps, rows: slice) -> None:
        self.sweeps, self.rows, self.n = sweeps, rows, rows.stop - rows.start
        system, at = sweeps.system, sweeps.at
        batch, heads, dim, n = system.batch, system.heads, system.dim, self.n
        self.y = at["y"][:, rows].to(system.wide).contiguous()
        inverse = at.get("inverse")
        queries = Queries(at["query"][:, rows].to(system.wide), None if inverse is None else inverse[:, rows])
        key = system.key[:, :, rows].to(system.wide) * system.spec.scale
        own = (key * system.per_head(queries.query.transpose(1, 2))).sum(-1)
        _, bias = system.block_bias(rows)
        lse = at["lse"][:, :, rows]
        p = torch.exp((own if bias is None else own + bias) - lse.masked_fill(torch.isneginf(lse), 0.0))
        value = system.per_head(system.value[:, :, rows].to(system.wide)).transpose(1, 2)
        self.u = (p.transpose(1, 2)[..., None] * (value - self.y)).contiguous()
        matrix = self._jacobians(queries, p)
        eye = torch.eye(heads, dtype=system.wide, device=matrix.device)
        self.inverses = torch.linalg.inv_ex(eye - matrix.mT)[0].contiguous()
        # An eigenvalue at a distance e from 1 makes the norm of the inverse 1 / e or more.
        self.matrix, self.suspect = matrix, ~(self.inverses.flatten(2).norm(dim=-1) * NEAR_SINGULAR < 1.0)
        self.f = self.u.new_full((2, batch, n, heads, dim), torch.inf)
        self.made = system.key.new_empty(2, batch, n, system.groups * dim)
        self.inside = {"length": n, "where": torch.zeros_like(sweeps.where), "n": n, "batch": batch}
        self.told = {"length": system.length, "where": sweeps.where, "n": n, "batch": batch}

    def _jacobians(self, queries: Queries, p: Tensor) -> Tensor:
        """The rows' own Jacobians, `[B, n, H, H]`, a few rows at a time: each takes `G H d` numbers several times."""
        system = self.sweeps.system
        few = max(1, AT_ONCE // (system.batch * system.groups * system.heads * system.dim))
        found = []
        for low in range(0, self.n, few):
            at = slice(low, min(low + few, self.n))
            place = slice(self.rows.start + at.start, self.rows.start + at.stop)
            inverse = None if queries.inverse is None else queries.inverse[:, at]
            found.append(
                own_jacobian(system, place, self.y[:, at], Queries(queries.query[:, at], inverse), p[:, :, at])
            )
        return torch.cat(found, 1)

    def solve(self, at: int) -> None:
        """From what lacks the own columns' part to the next cotangents of the outputs."""
        sweeps, system, call = self.sweeps, self.sweeps.system, self.sweeps.call
        sweeps.through_map(sweeps.into["made"], sweeps.grad, self.y, self.f, None, at, True, self.told)
        sweep_adjoint.own_columns[(self.n, system.batch)](
            self.f, self.u, self.inverses, call.key, sweeps.at["query"], sweeps.at.get("inverse"), call.turn,
            self.made, sweeps.found, sweeps.allowed, sweep=at, rtol=sweeps.rtol, scale=system.spec.scale, hp=call.hp,
            wide=sweeps.types["wide"], num_warps=4, **sweeps.key_strides, **sweeps.turned, **self.told, **sweeps.shape,
        )  # fmt: skip
        new = 1 - at % 2
        sweeps.through_map(self.made[new], self.f[new], self.y, sweeps.state, sweeps.narrow, at, False, self.inside)

    def finish(self) -> int:
        """Add the own columns' part to what was made; return how many rows cannot be differentiated."""
        sample = torch.arange(self.sweeps.system.batch, device=self.made.device)
        made = self.sweeps.into["made"]
        assert made is not None
        made[:, self.rows] += self.made[(self.sweeps.status % 2).long(), sample]
        return near_singular(self.matrix[self.suspect])
