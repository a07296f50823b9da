"""Training on recall, one step at a time, so that two models can be trained side by side."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.errors import check_positive
from implicit_attention.tasks.models import TokenModel
from implicit_attention.tasks.recall import Recall


@dataclass(frozen=True)
class Step:
    """The result of one training step.

    Attributes:
        step: Its number, from 1.
        loss: Training loss.
        accuracy: Accuracy on held-out sequences after the step, None where it was not measured.
        seconds: Time spent on the steps so far, evaluations included.
        solver_steps: Most solver steps of a system in the forward pass; 0 for a layer without a solver.
        unconverged: Share of its systems (rows of a causal layer) that missed the tolerance.
        residual: Its largest residual.
    """

    step: int
    loss: float
    accuracy: float | None
    seconds: float
    solver_steps: int = 0
    unconverged: float = 0.0
    residual: float = 0.0


def train(
    model: TokenModel,
    task: Recall,
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    evaluate_every: int = 20,
    held_out: int = 256,
) -> Iterator[Step]:
    """Train a model with AdamW, and yield the result of each step.

    Args:
        model: The model, changed in place.
        task: What to learn.
        steps: Number of steps.
        seed: Seed of the data; the same seed gives every model the same batches.
        batch_size: Sequences in a step.
        learning_rate: Learning rate of AdamW; its other settings are the defaults of torch.
        evaluate_every: Steps between evaluations; the last step is always evaluated.
        held_out: Number of held-out sequences; they have a seed of their own.

    Yields:
        The result of each step.

    Raises:
        TypeError: If a count is no integer.
        ValueError: If it is not positive.
    """
    check_positive("steps", steps, integer=True)
    check_positive("evaluate_every", evaluate_every, integer=True)
    training = torch.Generator().manual_seed(seed)
    fresh = task.batch(held_out, torch.Generator().manual_seed(seed + 1_000_003))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    seconds = 0.0
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        tokens, targets = task.batch(batch_size, training)
        logits, solution = model.solve(tokens)
        loss = task.loss(logits, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        accuracy = None
        if step % evaluate_every == 0 or step == steps:
            with torch.no_grad():
                accuracy = task.accuracy(model(fresh.tokens), fresh.targets)
        seconds += time.perf_counter() - begun
        yield Step(step, loss.item(), accuracy, seconds, *_figures(solution))


def _figures(solution: Solution | None) -> tuple[int, float, float]:
    if solution is None:
        return 0, 0.0, 0.0
    missed = (~solution.converged).float().mean()
    return int(solution.steps.max()), float(missed), float(solution.residual.max())
