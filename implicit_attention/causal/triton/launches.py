"""What sweeps in both directions share: state, launches as CUDA graphs, and when the host reads the device.

While blocks settle quickly, the host does not wait for the device: the sweeps of a block are one CUDA graph, and the
host starts the next block before it reads whether the last one settled.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from implicit_attention.causal.diagonal import Unsettled
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.call import TYPES, Call
from implicit_attention.causal.triton.tiles import tiles_for

# Sweeps that are launched together: after blocks that settled in half of `FEW`; usually. Larger: more idle launches
# after a block has settled. Smaller: the host waits for the device more often.
FEW, MORE = 4, 8
_REPEATED = 4  # whole blocks from which on capturing a graph costs less than the launches that it saves
# Sweeps of a block after which the next block is trusted to settle within `MORE`. Larger: fewer waits, but each wrong
# trust repeats a whole solve.
_SURE = 5


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


class Wary:
    """Number of solves that still read each block before the next, after a repeated solve. Results are the same."""

    AFTER = 64  # solves: a repeated solve costs one, so at most one in 65 is lost where blocks are unsure
    solves = 0


class Sweeps:
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
        self.calm, self.hopeful = False, self.graphed and not cautious and Wary.solves == 0
        Wary.solves = max(0, Wary.solves - 1)
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
                self.graphs = {count: _captured(partial(sweep, 0, count)) for count in (FEW, MORE)}
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
            Wary.solves = Wary.AFTER
            raise Unsettled
        self.took(max(states) + 1, calm=True)

    def took(self, sweeps: int, *, calm: bool) -> None:
        """Record the sweeps of a settled block."""
        self.guess, self.sweeps, self.calm = sweeps, max(self.sweeps, sweeps), calm

    def at_once(self) -> int:
        """The number of sweeps to launch before the host reads."""
        return FEW if 0 < self.guess <= FEW // 2 else MORE

    def by_map(self, n: int, out: int) -> tuple[int, int, int]:
        """The grid of a product with Omega_Q that has `out` heads as its output."""
        return triton.cdiv(n, self.tiles.rows), triton.cdiv(out, self.span), self.system.batch

    def by_tile(self, n: int, heads: int) -> tuple[int, int, int]:
        """The grid of an attention kernel."""
        return triton.cdiv(n, self.tiles.attended), heads, self.system.batch
