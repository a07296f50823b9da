"""One run: an arm trained on a task from a seed, and its record, ready for JSON."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.positions import RelativeBias
from implicit_attention.errors import NonFiniteError, check_positive
from implicit_attention.tasks.task import Batch, Task
from studies import flops, measures
from studies.arms import Sizes, arm_named
from studies.blocks import SequenceModel
from studies.models import build, parameters

Record = dict[str, Any]
Tell = Callable[[float], None]

JUDGED_SEED = 1  # every arm and seed has the same held-out sequences
MEASURED = 8  # sequences on which gradients and starts are compared
MOST_AT_ONCE = 64  # sequences judged together


@dataclass(frozen=True)
class Training:
    """How the runs of a table are trained.

    Attributes:
        steps: Steps at most.
        batch_size: Sequences in a step.
        evaluate_every: Steps between evaluations; the last step is always evaluated.
        held_out: Held-out sequences of each kind.
        solved: The score of the hardest kind at which the task counts as solved; None if there is none.
        rates: Learning rates to choose from.
        gradients: Whether gradients are compared at each evaluation.
    """

    steps: int
    batch_size: int
    evaluate_every: int
    held_out: int = 256
    solved: float | None = 0.99
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    gradients: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that cannot work."""
        for name in ("steps", "batch_size", "evaluate_every", "held_out"):
            check_positive(name, getattr(self, name), integer=True)


@dataclass(frozen=True)
class Run:
    """Everything that a run depends on.

    Attributes:
        table: Name of the table it belongs to.
        row: Name of its row there.
        arm: Name of the arm.
        task: The task.
        sizes: Sizes of the model.
        training: How it is trained.
        rate: Learning rate.
        seed: Seed of weights and training batches.
    """

    table: str
    row: str
    arm: str
    task: Task
    sizes: Sizes
    training: Training
    rate: float
    seed: int

    def settings(self) -> Record:
        """Return everything that the record depends on, except versions, as JSON values."""
        return {
            "table": self.table,
            "row": self.row,
            "arm": self.arm,
            "task": {"name": type(self.task).__name__, **_fields(self.task)},
            "sizes": _fields(self.sizes),
            "training": _fields(self.training),
            "rate": self.rate,
            "seed": self.seed,
        }


def _fields(thing: Any) -> Record:
    return {
        field.name: list(value) if isinstance(value := getattr(thing, field.name), tuple) else value
        for field in dataclasses.fields(thing)
    }


def perform(run: Run, tell: Tell = lambda done: None, *, device: str = "cpu") -> Record:
    """Train, evaluate and measure.

    The same run gives the same figures, whatever else the machine does: one thread, and randomness that is drawn
    from the run's seed alone. Only seconds differ.

    Args:
        run: The run.
        tell: Called after each step with how much of the run is done, from 0 to 1.
        device: Where the model is. Records that are compared are made on the CPU.

    Returns:
        The record: "settings", "parameters", "flops" of a step, "seconds" of training (of the processor: what the clock
        shows on a core that does nothing else), "wall_seconds" of all, "curve", "score" and "scores" at the end,
        "solved_at" (the step of the first of two evaluations in a row that solved it, else None), "end" ("solved",
        "steps" or "diverged"), "skipped" (steps whose gradient was not finite and not taken), "unsettled" (largest
        share of systems above tolerance in a training step), "path_independence".

    Raises:
        ValueError: If the arm and the task do not go together.
    """
    with on_one_thread():
        return Course(run, device).record(tell)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Train on one thread: sums then do not depend on their number, nor seconds on what other cores do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _moved(batch: Batch, device: str) -> Batch:
    return Batch(*(part.to(device) for part in batch))


class Course:
    """A run in progress."""

    def __init__(self, run: Run, device: str = "cpu") -> None:
        """Draw the model, and the sequences that it is judged on.

        Args:
            run: The run.
            device: As in `perform`.
        """
        self.run, self.task, self.training, self.device = run, run.task, run.training, device
        self.model = build(arm_named(run.arm), run.task, run.sizes, run.seed).to(device)
        self.batches = torch.Generator().manual_seed(run.seed)
        held_out = run.task.held_out(self.training.held_out, JUDGED_SEED)
        self.judged = {kind: _moved(batch, device) for kind, batch in held_out.items()}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, run.rate, run.sizes.bias_rate), lr=run.rate)
        steps = self.training.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, steps))
        self.curve: list[Record] = []
        self.solver_steps: list[float] = []
        self.length, self.skipped = 0, 0
        self.unsettled = 0.0
        self.begun = time.perf_counter()

    def record(self, tell: Tell) -> Record:
        """Train to the end, and return the record; arguments and result as in `perform`."""
        seconds, end, step = 0.0, "steps", 0
        for step in range(1, self.training.steps + 1):
            begun = time.process_time()
            loss = self.step()
            seconds += time.process_time() - begun
            if not math.isfinite(loss):
                end = "diverged"
                break
            if step % self.training.evaluate_every == 0 or step == self.training.steps:
                self.curve.append({"step": step, "loss": loss, "seconds": seconds, **self._evaluate()})
                if self._solved_at() is not None:
                    end = "solved"
                    break
            tell(step / self.training.steps)
        return self._record(end, step, seconds)

    def step(self) -> float:
        """Take one step of training. Return its loss, NaN if the weights or the loss are no longer finite."""
        batch = _moved(self.task.batch(self.training.batch_size, self.batches), self.device)
        self.length = batch.inputs.shape[1]
        self.optimizer.zero_grad()
        try:
            logits, solutions = self.model.solve(batch.inputs)
        except NonFiniteError:
            return math.nan
        loss = self.task.loss(logits, batch)
        if not bool(loss.isfinite()):
            return math.nan
        loss.backward()  # type: ignore[no-untyped-call]
        self.solver_steps = [float(s.steps.double().mean()) for s in solutions]
        self.unsettled = max([self.unsettled, *(float((~s.converged).double().mean()) for s in solutions)])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if bool(norm.isfinite()):
            self.optimizer.step()
        else:
            self.skipped += 1
        self.schedule.step()
        return loss.item()

    def _evaluate(self) -> Record:
        scores, solver = {}, {}
        for kind, batch in self.judged.items():
            scores[kind], figures = judge(self.model, self.task, batch)
            solver[kind] = figures
        first = next(iter(self.judged.values()))
        found: Record = {
            "score": min(found[self.task.score] for found in scores.values()),
            "scores": scores,
            **({"solver": solver} if any(solver.values()) else {}),
        }
        if self.training.gradients:
            found["gradients"] = measures.gradient_quality(self.model, self.task, measures.part(first, MEASURED))
        return found

    def _solved_at(self) -> int | None:
        """The step of the last evaluation but one, if it and the last one solved the task."""
        goal, last = self.training.solved, self.curve[-2:]
        if goal is None or len(last) < 2 or min(entry["score"] for entry in last) < goal:
            return None
        return int(last[0]["step"])

    def _record(self, end: str, step: int, seconds: float) -> Record:
        last = self.curve[-1] if self.curve and end != "diverged" else {"score": None, "scores": {}}
        first = next(iter(self.judged.values()))
        independence = None
        if end != "diverged":
            independence = measures.path_independence(self.model, measures.part(first, MEASURED))
        return {
            "settings": self.run.settings(),
            "parameters": parameters(self.model),
            "flops": flops.training_step(self.model, self.training.batch_size, self.length, self.solver_steps)
            if end != "diverged" else None,
            "end": end,
            "last_step": step,
            "skipped": self.skipped,
            "unsettled": self.unsettled,
            "seconds": seconds,
            "wall_seconds": time.perf_counter() - self.begun,
            "solved_at": self._solved_at() if end == "solved" else None,
            "score": last["score"],
            "scores": last["scores"],
            "path_independence": independence,
            "curve": self.curve,
        }  # fmt: skip


def parameter_groups(model: SequenceModel, rate: float, bias_rate: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups. Relative biases have a higher rate and no weight decay.

    A bias has to grow to about log N before it singles an offset out of N, and Adam moves it by about the learning
    rate in a step.

    Args:
        model: The model.
        rate: Learning rate of all other weights.
        bias_rate: Learning rate of the biases, as a multiple of it.
    """
    tables = [part.table for part in model.modules() if isinstance(part, RelativeBias)]
    apart = {id(table) for table in tables}
    others = [p for p in model.parameters() if id(p) not in apart]
    return [{"params": others}, {"params": tables, "lr": bias_rate * rate, "weight_decay": 0.0}]


def rate_factor(step: int, steps: int) -> float:
    """Return the factor on the learning rate: it rises over the first twentieth, then falls to a tenth.

    Args:
        step: Steps taken so far.
        steps: Steps of the whole run.
    """
    up = min(1.0, (step + 1) / max(1.0, steps / 20))
    return up * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def judge(model: SequenceModel, task: Task, batch: Batch) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return a model's scores on a batch, and its solver statistics.

    Args:
        model: The model.
        task: What is asked.
        batch: Sequences, evaluated in parts.
    """
    logits: list[Tensor] = []
    solutions = []
    with torch.no_grad():
        for inputs in torch.split(batch.inputs, MOST_AT_ONCE):
            try:
                found, solved = model.solve(inputs, gains=True)
            except NonFiniteError:
                return {task.score: -math.inf}, {}
            logits.append(found)
            solutions += solved
        return task.scores(torch.cat(logits), batch), measures.solver_figures(solutions)
