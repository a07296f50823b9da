"""Time and memory of a forward and backward pass, measured so that the numbers can be believed."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


def interleaved_seconds(
    runs: Mapping[Key, Run],
    repeats: int,
    *,
    warm: bool = False,
    apart: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Time every run in turn, again and again: what else the machine does then hits all of them alike.

    One untimed round goes first, unless the runs are warm already. With `apart` every timed run follows an untimed one
    of its own: memory that the C library gave back after another's run has to be faulted in again, which can cost a
    short run a tenth of its time.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + (not warm)):
        for name, run in runs.items():
            if apart:
                run()
            begun = clock()
            run()
            if warm or round_:
                seconds[name].append(clock() - begun)
    return seconds


def timing(seconds: list[float]) -> dict[str, float | list[float]]:
    """Median, extremes and all of the times."""
    return {
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "seconds": seconds,
    }


def added_peak_bytes(run: Run) -> int:
    """Return how far the memory held in tensors rises above its level at the start of the run.

    PyTorch's profiler records every allocation and release of the CPU allocator; their running sum, from the
    first event of the run, is followed to its maximum. Unlike the resident set it counts no pages that an
    earlier run left behind, and does not depend on what the C library gives back.
    """
    run()  # what is allocated once and kept is not the pass's own
    return peak_and_seconds(run)[0]


def peak_and_seconds(run: Run) -> tuple[int, float]:
    """The same for a single run, which may be the first, and how long it took under the profiler."""
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
        seconds = time.perf_counter() - begun
    held = peak = 0
    for event in sorted(_allocations(recorded), key=lambda e: e[0]):
        held += event[1]
        peak = max(peak, held)
    return peak, seconds


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """Time and size of every allocation (positive) and release (negative)."""
    kineto = recorded.profiler.kineto_results
    return [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
