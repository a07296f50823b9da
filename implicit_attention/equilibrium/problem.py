"""A fixed-point equation with the settings to solve it, and what is told how a solve went."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.solvers import Method, Solution, Solver, solve
from implicit_attention.equilibrium.solvers.solution import AdjointSolution


class Report(Protocol):
    """Receives the outcome of every solve."""

    def __call__(self, solution: Solution, name: str, solver: Method) -> None:
        """Receive the outcome of a solve, the name of the equation, and the solver."""

    def adjoint(self, found: AdjointSolution, grad: Tensor, solver: Method) -> None:
        """Receive the outcome of an adjoint equation that a direct solver solved for the cotangent `grad`."""


@dataclass(frozen=True)
class Problem:
    """A fixed-point equation with the settings to solve and to differentiate it.

    Attributes:
        function: The map, `(y, *args) -> tensor like y`. It must be pure: torch.func transforms run it again.
        solver: The solver.
        system_ndim: Leading dimensions of y that count independent systems.
        row_ndim: Leading dimensions of y whose residuals are judged one by one.
        report: Receives every solution, with the name of the equation.
        name: Name of the equation.
        linear: Whether the map is affine in y.
    """

    function: maps.MapFunction
    solver: Method
    system_ndim: int
    row_ndim: int
    report: Report
    name: str = "equilibrium"
    linear: bool = False

    def solve(self, function: Callable[[Tensor], Tensor], y0: Tensor, *, history: bool = False) -> Solution:
        """Iterate on the map, whose arguments are filled in, and report the outcome."""
        assert isinstance(self.solver, Solver)
        solution = solve(
            self.solver,
            function,
            y0,
            system_ndim=self.system_ndim,
            row_ndim=self.row_ndim,
            linear=self.linear,
            history=history,
        )
        self.report(solution, self.name, self.solver)
        return solution
