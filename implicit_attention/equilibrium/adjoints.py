"""Gradient methods for an equilibrium: implicit differentiation, unrolling, and phantom steps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.implicit_function import Run, impure, solve_opaquely
from implicit_attention.equilibrium.outside_graphs import outside_graphs
from implicit_attention.equilibrium.problem import Problem
from implicit_attention.equilibrium.solvers import Method, Solution
from implicit_attention.equilibrium.solvers.solution import nothing_to_solve, zero_of
from implicit_attention.errors import Came, bad_type, bad_value, check_choice, check_positive

_READS = "This solver reads residuals on the host to decide when to stop."
_WHOLE = (
    "Or take a layer with is_causal=True, or with query_input=True and max_gain=0.9, whose solver a graph can hold."
)


class Adjoint(ABC):
    """Base of the gradient methods."""

    @abstractmethod
    def apply(self, problem: Problem, y0: Tensor, args: tuple[Tensor, ...], *, history: bool) -> Solution:
        """Solve the problem; gradients flow through the value of the returned solution to `args`.

        Args:
            problem: The equation.
            y0: Start.
            args: Arguments of the map.
            history: Whether to keep every iterate.
        """

    def __call__(self, problem: Problem, y0: Tensor, args: tuple[Tensor, ...], *, history: bool = False) -> Solution:
        """Call `apply`. torch.compile does not trace it, since the number of steps depends on the data."""
        if not y0.numel():  # an empty batch: nothing to solve, and the gradients are zero
            return nothing_to_solve(y0 + zero_of((y0.detach(), *args)).to(y0.dtype), problem.row_ndim)
        if torch.compiler.is_compiling():
            return outside_graphs(self.apply, _READS, _WHOLE)(problem, y0, args, history=history)
        return self.apply(problem, y0, args, history=history)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagate through the steps of the solver, as the seed does.

    Memory grows with the number of steps. Gradients also flow to the start. The solver's steps must be differentiable:
    Picard, Anderson or Broyden.

    Attributes:
        checkpoint: Keep the iterates only, and recompute the inside of the map in the backward pass.
    """

    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_choice("checkpoint", self.checkpoint, (True, False))

    def check(self, solver: Method) -> None:
        """Refuse a solver whose steps autograd cannot differentiate.

        Args:
            solver: The solver.

        Raises:
            ValueError: If it is such.
        """
        if not solver.unrollable:
            raise bad_value(
                "adjoint",
                f"Implicit() or Phantom() with solver={type(solver).__name__}",
                Came("Unrolled()"),
                "Its steps cannot be differentiated: change the adjoint, or choose Picard, Anderson or Broyden.",
            )

    def apply(self, problem: Problem, y0: Tensor, args: tuple[Tensor, ...], *, history: bool) -> Solution:
        """Solve, with autograd recording the steps."""
        self.check(problem.solver)
        try:
            return problem.solve(lambda y: self._call(problem.function, y, args), y0, history=history)
        except RuntimeError as error:
            if "data-dependent control flow" not in str(error):
                raise
            raise RuntimeError(
                "Unrolled() reads residuals to decide when to stop, which torch.func.vmap does not allow. "
                "Use Implicit() or Phantom(), or map over the batch dimension instead."
            ) from error

    def _call(self, function: maps.MapFunction, y: Tensor, args: tuple[Tensor, ...]) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(function, y, *args, use_reentrant=False)
            return out
        return function(y, *args)


@dataclass(frozen=True)
class Phantom(Adjoint):
    """Solve without autograd, then take a few damped steps of the map with autograd.

    The gradient is a truncated, damped Neumann series of the exact gradient: cheap and biased. One step with damping 1
    is the "one-step gradient" (Jacobian-free backpropagation). The returned value is the value after these steps.

    Attributes:
        steps: Number of recorded steps.
        damping: Length of a step, in (0, 1].

    Reference:
        Geng, Zhang, Bai, Wang and Lin, "On Training Implicit Models", NeurIPS 2021; Fung et al., "JFB",
        AAAI 2022.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_positive("steps", self.steps, integer=True)
        check_positive("damping", self.damping)
        if self.damping > 1:
            raise bad_value("damping", "in (0, 1]", self.damping)

    def apply(self, problem: Problem, y0: Tensor, args: tuple[Tensor, ...], *, history: bool) -> Solution:
        """Solve, then take the recorded steps."""
        with torch.no_grad():
            solution = solve_opaquely(Run(problem, problem.solver, record=False, history=history), y0, args)
        y = solution.value.detach()  # torch.func records below its own levels in spite of no_grad
        if torch.is_grad_enabled():
            for _ in range(self.steps):
                y = y + self.damping * (problem.function(y, *args) - y)
        return replace(solution, value=y)


@dataclass(frozen=True)
class Implicit(Adjoint):
    r"""Differentiate the equilibrium itself: `dy*/dt = (I - J)^{-1} dF/dt` (implicit function theorem).

    The backward pass solves the adjoint equation `lam = g + J^T lam` and returns `lam^T dF/dt`. Memory is that of one
    evaluation of the map, for any number of iterations. The gradient can be differentiated again, and works under
    torch.func transforms.

    Attributes:
        solver: Solver of the adjoint equation. None takes the solver of the equilibrium with its relative tolerance and
            an absolute tolerance of 0, since cotangents have no scale of their own.

    Reference:
        Bai, Kolter and Koltun, "Deep Equilibrium Models", arXiv 1909.01377, theorem 1.
    """

    solver: Method | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.solver is not None and not isinstance(self.solver, Method):
            raise bad_type("solver", "None or a solver object such as Anderson()", self.solver)

    def apply(self, problem: Problem, y0: Tensor, args: tuple[Tensor, ...], *, history: bool) -> Solution:
        """Solve, and attach the implicit gradient to the value of the solution."""
        if maps.closes_over_mapped(problem.function, y0, args):
            raise impure("a tensor of a torch.func transform")
        run = Run(problem, self._adjoint_solver(problem), record=torch.is_grad_enabled(), history=history)
        return solve_opaquely(run, y0, args)

    def _adjoint_solver(self, problem: Problem) -> Method:
        if self.solver is not None:
            return self.solver
        return replace(problem.solver, atol=None)
