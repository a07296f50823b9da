"""Measurements of a trained model's equilibria: solver statistics, other starts, gradients."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Adjoint
from implicit_attention.equilibrium.adjoints import Implicit as ImplicitAdjoint
from implicit_attention.equilibrium.fixed_point import fixed_point
from implicit_attention.equilibrium.solvers import Anderson, Solution
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.tasks.task import Batch, Task
from studies.arms import ADJOINTS
from studies.blocks import Block, ParallelBlock, SequenceModel
from studies.mixers import Implicit

Figures = dict[str, float]


def solver_figures(solutions: Sequence[Solution]) -> Figures:
    """Return the solver statistics of a forward pass over all equilibria; empty if there are none.

    Args:
        solutions: From `SequenceModel.solve`.

    Returns:
        Mean and largest steps of a system, largest residual, share of systems above tolerance, and mean and largest
        gain where it is known.
    """
    if not solutions:
        return {}
    steps = torch.cat([s.steps.flatten().double() for s in solutions])
    figures = {
        "steps": float(steps.mean()),
        "most_steps": float(steps.max()),
        "residual": max(float(s.residual.max()) for s in solutions),
        "unconverged": float(torch.cat([(~s.converged).flatten().double() for s in solutions]).mean()),
    }
    gains = [s.gain.flatten().double() for s in solutions if s.gain is not None]
    if gains:
        figures |= {"gain": float(torch.cat(gains).mean()), "largest_gain": float(torch.cat(gains).max())}
    return figures


def implicit_layers(model: SequenceModel) -> list[ImplicitQueryAttention]:
    """Return a model's implicit layers, first to last."""
    mixers = [block.mixer for block in model.blocks if isinstance(block, ParallelBlock)]
    return [mixer.layer for mixer in mixers if isinstance(mixer, Implicit)]


def path_independence(model: SequenceModel, batch: Batch) -> Figures | None:
    """Solve the first equilibrium again from another start, and compare.

    The other start is the values of the tokens in reverse order, from which Anderson's method goes on as it does
    without a causal mask. A second solve that does not arrive says nothing, and is counted apart.

    Args:
        model: The model.
        batch: Inputs to solve for.

    Returns:
        Share of rows whose second solve arrived; of these the share that differ by at most 100 tolerances, and the
        largest difference among them, if 100 tolerances are at most 1 % of the largest output. None for a model without
        implicit layers, or with `max_gain`: those have one equilibrium.
    """
    layers = implicit_layers(model)
    if not layers or layers[0].max_gain is not None:
        return None
    layer = layers[0]
    first = model.blocks[0]
    assert isinstance(first, Block)
    with torch.no_grad(), model.autocast():
        x = first.norm_mixer(model.embedding(batch.inputs))
        solution, equation = layer.solve(x), layer.equation(x)
        solver = Anderson(rtol=layer.solver.rtol, atol=layer.solver.atol, max_steps=200)
        again = fixed_point(
            equation.function, equation.start.flip(1), equation.args, solver=solver,
            system_ndim=equation.function.system_ndim, on_failure="ignore",
        )  # fmt: skip
    difference = (again.value.reshape(solution.value.shape) - solution.value).abs().amax(-1)
    arrived = again.converged & _per_system(solution.converged, again.converged)
    arrived = arrived.reshape(*arrived.shape, *[1] * (difference.dim() - arrived.dim())).expand_as(difference)
    figures = {"arrived": float(arrived.double().mean())}
    found, bound = difference[arrived], 100 * (layer.solver.atol or 1e-5)
    if len(found) and bound <= float(solution.value.abs().max()) / 100:
        figures |= {"same": float((found <= bound).double().mean()), "largest_difference": float(found.max())}
    return figures


def _per_system(converged: Tensor, like: Tensor) -> Tensor:
    """Whether all rows of each system converged, where `like` has fewer dimensions than there are rows."""
    return converged.all(-1) if converged.dim() > like.dim() else converged


def gradient_quality(model: SequenceModel, task: Task, batch: Batch) -> Figures:
    """Return the cosine of each kind of gradient to the exact one, and the spectral radius they were taken at.

    The exact one is that of a copy in float64 whose equilibrium and adjoint are solved to 1e-10. The others are taken
    in the model's precision: implicit differentiation with the model's own solver, `Phantom()` and one undamped step.

    Args:
        model: A model with implicit layers under a causal mask.
        task: The task, whose loss is differentiated.
        batch: The batch.

    Returns:
        Cosines by the names of `ADJOINTS`, and "radius", the largest gain of a row.
    """
    exact = _twin(model, ImplicitAdjoint()).double()
    exact.precision = None
    for layer in implicit_layers(exact):
        layer.solver = ForwardSubstitution(rtol=1e-10, atol=1e-10)
    wanted = _gradient(exact, task, batch)
    figures = {}
    for name, adjoint in ADJOINTS.items():
        got = _gradient(_twin(model, adjoint), task, batch)
        figures[name] = float(torch.nn.functional.cosine_similarity(got, wanted, dim=0))
    with torch.no_grad():
        solutions = model.solve(batch.inputs, gains=True)[1]
    gains = [s.gain.max() for s in solutions if s.gain is not None]
    return figures | {"radius": float(torch.stack(gains).max())}


def _twin(model: SequenceModel, adjoint: Adjoint) -> SequenceModel:
    twin = copy.deepcopy(model)
    for layer in implicit_layers(twin):
        layer.adjoint = adjoint
    return twin


def _gradient(model: SequenceModel, task: Task, batch: Batch) -> Tensor:
    model.zero_grad()
    task.loss(model(batch.inputs), batch).backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in found]).double()


def part(batch: Batch, size: int) -> Batch:
    """Return the first sequences of a batch."""
    return Batch(batch.inputs[:size], batch.targets[:size])
