"""`fixed_point`: solve any map and differentiate the result; and the report of failed solves."""

import itertools
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit, Problem
from implicit_attention.equilibrium.solvers import Anderson, Solution, Solver
from implicit_attention.equilibrium.solvers.base import AdjointSolution
from implicit_attention.errors import (
    ConvergenceError,
    ConvergenceWarning,
    bad_type,
    bad_value,
    check_choice,
    check_positive,
)

_ADVICE = {
    "equilibrium": "Raise max_steps or the tolerances, damp (Picard(damping=0.5)), or use NewtonKrylov().",
    "adjoint equation": "The gradient is not to be trusted: raise max_steps or the adjoint's tolerance, or use "
    "Implicit(NewtonKrylov()).",
}


_HANDLES = itertools.count(1)
_REPORTS: "weakref.WeakValueDictionary[int, FailureReport]" = weakref.WeakValueDictionary()


@dataclass
class FailureReport:
    """Says once, in the way that was asked for, that a solve missed its tolerance.

    Attributes:
        on_failure: "warn" (once for each of equilibrium and adjoint), "raise" or "ignore".
        handle: Its number.
    """

    on_failure: str = "warn"
    _said: set[str] = field(default_factory=set, repr=False)
    handle: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse an unknown mode."""
        check_choice("on_failure", self.on_failure, ("warn", "raise", "ignore"))
        self._register()

    def _register(self) -> None:
        self.handle = next(_HANDLES)
        _REPORTS[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy speaks for another layer
        self._register()

    @staticmethod
    def of(handle: int) -> "FailureReport":
        """Return the report with a handle, which is how a compiled graph names it; one that warns if it is gone."""
        return _REPORTS.get(handle) or FailureReport()

    def __call__(self, solution: Solution, name: str) -> None:
        """Report a solution if it failed.

        Args:
            solution: The outcome.
            name: What was solved, "equilibrium" or "adjoint equation".

        Raises:
            ConvergenceError: If it failed and `on_failure` is "raise".
        """
        if self.on_failure == "ignore" or (self.on_failure == "warn" and name in self._said):
            return
        if bool(solution.converged.all()):
            return
        failed = int((~solution.converged).sum())
        message = (
            f"The {name} was not solved: {failed} of {solution.converged.numel()} systems are above tolerance "
            f"after {int(solution.steps.max())} steps (largest residual {float(solution.residual.max()):.2e}). "
            f"{_ADVICE[name]}"
        )
        self._say(message, name)

    def adjoint(self, found: AdjointSolution, grad: Tensor) -> None:
        """Report an adjoint equation that was solved directly, if it failed or its gradient is not to be trusted.

        Args:
            found: The outcome.
            grad: Cotangent of the equilibrium, `[B, N, D]`.

        Raises:
            ConvergenceError: If `on_failure` is "raise".
        """
        steps, none = torch.full_like(found.residual, found.steps, dtype=torch.long), found.residual[None]
        self(Solution(grad, found.residual, steps, found.converged, none, none), "adjoint equation")
        if found.near_singular:
            self.near_singular(found.near_singular, grad.shape[:-1].numel())

    def near_singular(self, rows: int, of: int) -> None:
        """Report rows where the derivative of the equilibrium does not exist to working precision.

        Args:
            rows: How many have a gain (an eigenvalue of their own Jacobian) within 1e-3 of 1.
            of: Of how many.

        Raises:
            ConvergenceError: If `on_failure` is "raise".
        """
        self._say(
            f"The gradient is not to be trusted: {rows} of {of} rows have a gain within 1e-3 of 1, where the "
            "equilibrium has no derivative. Keep gains down (weight decay, qk_norm, diagnostics.gain_penalty), or use "
            'self_query="input", whose gains are 0.',
            "near-singular gradient",
        )

    def _say(self, message: str, name: str) -> None:
        if self.on_failure == "ignore" or (self.on_failure == "warn" and name in self._said):
            return
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        self._said.add(name)
        warnings.warn(f"{message} Said once.", ConvergenceWarning, stacklevel=3)


def fixed_point(
    function: maps.MapFunction | nn.Module,
    y0: Tensor,
    args: tuple[Tensor, ...] = (),
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    system_ndim: int = 1,
    on_failure: str = "warn",
    history: bool = False,
) -> Solution:
    """Solve `y = function(y, *args)`; gradients flow to `args`.

    Args:
        function: A pure function `(y, *args) -> tensor like y`, or an `nn.Module` with that signature. The module's
            parameters receive gradients too. No system's result may depend on another system.
        y0: Start, `[*systems, ...]`, float.
        args: Tensors that the map depends on.
        solver: A solver; `Anderson()` if None.
        adjoint: `Implicit()` if None, `Unrolled()` or `Phantom()`.
        system_ndim: Number of leading dimensions of y0 that count independent systems. Each system stops for itself.
        on_failure: "warn", "raise" or "ignore" if the residual stays above tolerance.
        history: Whether to keep every iterate in `Solution.history`.

    Returns:
        The solution; its `value` carries the gradient.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If y0 has too few dimensions, the map's result is not like y0, or the map returns NaN or Inf.
        ConvergenceError: If a solve fails and `on_failure` is "raise".

    Example:
        >>> import torch
        >>> a = torch.tensor([0.5], requires_grad=True)
        >>> y = fixed_point(lambda y, a: torch.cos(a * y), torch.zeros(1, 1), (a,)).value
        >>> y.sum().backward()
    """
    solver, adjoint = Anderson() if solver is None else solver, Implicit() if adjoint is None else adjoint
    if not isinstance(solver, Solver):
        raise bad_type("solver", "a solver object such as Anderson()", solver)
    if not isinstance(adjoint, Adjoint):
        raise bad_type("adjoint", "Implicit(), Unrolled() or Phantom()", adjoint)
    if not isinstance(y0, Tensor) or not y0.is_floating_point():
        raise bad_type("y0", "a floating-point tensor", y0)
    check_positive("system_ndim", system_ndim, integer=True)
    if y0.dim() < system_ndim:
        raise bad_value("y0", f"a tensor with at least system_ndim={system_ndim} dimensions", y0)
    call, lifted = maps.lift(function, args)
    problem = Problem(_checked(call), solver, system_ndim, system_ndim, FailureReport(on_failure))
    return adjoint(problem, y0, lifted, history=history)


def _checked(function: maps.MapFunction) -> maps.MapFunction:
    def call(y: Tensor, *args: Tensor) -> Tensor:
        out = function(y, *args)
        if not isinstance(out, Tensor) or out.shape != y.shape:
            raise bad_value("function", f"a map that returns a tensor of shape {tuple(y.shape)}, like y", out)
        return out

    return call
