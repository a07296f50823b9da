"""Runs in several processes at once, each on one thread. Results do not depend on the number of processes."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait

from studies.run import Record, Run, perform

Progress = Callable[[Run, float], None]


def records(runs: Iterable[Run], workers: int, progress: Progress) -> Iterator[tuple[Run, Record]]:
    """Perform runs, and yield each with its record as soon as it is done.

    Args:
        runs: The runs, started in this order.
        workers: Processes; with one, runs are performed in this process.
        progress: Called with how much of a run is done, from 0 to 1.

    Yields:
        A run and its record.

    Raises:
        RuntimeError: If a run failed or its process ended.
    """
    if workers == 1:
        for run in runs:
            try:
                record = perform(run, partial(progress, run))
            except Exception:
                raise _failure(run, traceback.format_exc()) from None
            yield run, record
        return
    waiting = list(runs)[::-1]
    hands = [_Hand() for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or any(hand.run for hand in hands):
            for hand in hands:
                if hand.run is None and waiting:
                    hand.take(waiting.pop())
            for ready in wait([hand.line for hand in hands if hand.run]):
                hand = next(hand for hand in hands if hand.line is ready)
                run, message = hand.listen()
                if isinstance(message, float):
                    progress(run, message)
                else:
                    yield run, message
    finally:
        for hand in hands:
            hand.dismiss()


class _Hand:
    """A process that performs one run after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        with _single_threaded():
            self.process.start()
        other.close()
        self.run: Run | None = None

    def take(self, run: Run) -> None:
        self.run = run
        self.line.send(run)

    def listen(self) -> tuple[Run, float | Record]:
        assert self.run is not None
        run = self.run
        try:
            message = self.line.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process of {run.table}, {run.row}, seed {run.seed} ended with status {self.process.exitcode}"
            ) from None
        if isinstance(message, str):
            raise _failure(run, message)
        if not isinstance(message, float):
            self.run = None
        return run, message

    def dismiss(self) -> None:
        self.process.terminate()
        self.process.join()
        self.line.close()


def _failure(run: Run, message: str) -> RuntimeError:
    return RuntimeError(f"{run.table}, {run.row}, seed {run.seed} failed:\n{message}")


class _single_threaded:  # noqa: N801 (used as a function)
    """Started processes compute on one thread each: OpenMP reads its setting when it is loaded."""

    def __enter__(self) -> None:
        self.before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = self.before


def _work(line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    while True:
        try:
            run = line.recv()
        except EOFError:
            return
        try:
            line.send(perform(run, lambda done: line.send(float(done))))
        except Exception:  # the other process raises it
            line.send(traceback.format_exc())
