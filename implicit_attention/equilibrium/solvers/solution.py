"""The results of a solve and of an adjoint equation, the same for all solvers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_attention.errors import counted


@dataclass(frozen=True, repr=False)
class Solution:
    """The result of a solve, the same for all solvers.

    The residual is the largest componentwise difference `|F(value) - value|`, measured at the returned value. It has
    the same meaning for every sequence length. `Contraction` and `Phantom` measure it at the iterate that `value` was
    made from, which is farther from the equilibrium. An independent system is a sample, `[B]`, or a token, `[B, N]`, if
    tokens do not depend on each other. Causal maps report row by row, `[B, N]`.

    Attributes:
        value: The equilibrium, with the shape and dtype of the start.
        residual: Absolute residual per system.
        steps: Steps per system; for rows of one system, until the row was within tolerance for good.
        converged: Whether the residual is within tolerance, per system.
        abs_trace: Absolute residual at each iterate, the start first, `[steps + 1, *systems]`. A direct solver such as
            `ForwardSubstitution` has no iterates: `[1, *systems]`, the residual at `value`.
        rel_trace: The same, relative to the largest component of `F(y)`.
        evaluations: Number of evaluations of the map or its Jacobian, each for the whole batch.
        history: Every iterate, the start first; None unless asked for. Direct solvers have none, and refuse.
        unique: Whether it is known to be the only equilibrium, whatever the weights: with `max_gain`, or under a causal
            mask with `self_query="input"`.
        gain: Spectral radius of each row's own Jacobian, `[B, N]`; None unless asked for. The maximum is the spectral
            radius of the causal map.
        memo: Tensors that a direct solver keeps for its adjoint. For `ForwardSubstitution`: the queries at the
            equilibrium `[B, N, G, d]`, the log-sum-exp `[B, H, N]`, and the inverse norms of the queries.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    converged: Tensor
    abs_trace: Tensor
    rel_trace: Tensor
    evaluations: int = 0
    history: list[Tensor] | None = None
    gain: Tensor | None = None
    unique: bool = False
    memo: tuple[Tensor, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        """Return one line: shape, steps, residual, and how many systems converged."""
        dtype = str(self.value.dtype).removeprefix("torch.")
        return f"Solution({dtype}{list(self.value.shape)}, {in_one_line(self)})"

    @property
    def stats(self) -> dict[str, Any]:
        """The statistics of the solve as plain tensors, under torchdeq's names."""
        found = {
            "abs_trace": self.abs_trace,
            "rel_trace": self.rel_trace,
            "nstep": self.steps,
            "evaluations": self.evaluations,
        }
        return found if self.gain is None else found | {"sradius": self.gain}

    def unbatched(self) -> "Solution":
        """Return the solution of a batch of one without its batch dimension."""
        return Solution(
            value=self.value[0],
            residual=self.residual[0],
            steps=self.steps[0],
            converged=self.converged[0],
            abs_trace=self.abs_trace[:, 0],
            rel_trace=self.rel_trace[:, 0],
            evaluations=self.evaluations,
            history=None if self.history is None else [y[0] for y in self.history],
            gain=None if self.gain is None else self.gain[0],
            unique=self.unique,
        )


@dataclass(frozen=True)
class AdjointSolution:
    """The outcome of an adjoint equation that a direct solver solved.

    Attributes:
        by_arg: Gradient of each tensor of the map, None if it was not needed.
        residual: Residual of the adjoint equation per sample, `[B]`.
        converged: Whether the residual is within tolerance, `[B]`.
        steps: Largest number of sweeps of a block.
        near_singular: Number of rows with an eigenvalue so close to 1 that the gradient cannot be trusted.
    """

    by_arg: list[Tensor | None]
    residual: Tensor
    converged: Tensor
    steps: int
    near_singular: int = 0


def in_one_line(figures: Any) -> str:
    """Return steps, residual and convergence of a solve in words.

    Args:
        figures: Has them as attributes, as `Solution` does.
    """
    residual, steps, converged = figures.residual, figures.steps, figures.converged
    if not residual.numel():
        return "nothing to solve"
    try:
        within, most, worst = int(converged.sum()), int(steps.max()), float(residual.detach().max())
    except RuntimeError:  # inside a transform or a trace, tensors have no numbers
        return f"{converged.numel()} systems"
    return f"{within} of {converged.numel()} converged, at most {counted(most, 'step')}, largest residual {worst:.1e}"


def nothing_to_solve(y0: Tensor, row_ndim: int) -> Solution:
    """Return the solution of an empty batch.

    Args:
        y0: The start, without elements.
        row_ndim: Number of leading dimensions that count the rows.
    """
    none = torch.zeros(y0.shape[:row_ndim], dtype=torch.promote_types(y0.dtype, torch.float32), device=y0.device)
    return Solution(y0, none, none.long(), none == 0, none[None], none[None])


def zero_of(args: tuple[Tensor, ...]) -> Tensor:
    """Return zero as a function of tensors, so that each of them gets a gradient, of zeros, where others train on."""
    zero = args[0].new_zeros(())
    for arg in args:
        if arg.requires_grad:
            zero = zero + 0 * arg.sum()
    return zero


def writable(y: Tensor) -> Tensor:
    """Return an equilibrium that the caller may change in place: a copy if the backward pass keeps it."""
    return y.clone() if y.requires_grad else y
