"""What is said of solves that fail, and what is kept of the last one."""

import itertools
import sys
import threading
import weakref
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.solvers import Method, Solution
from implicit_attention.equilibrium.solvers.solution import AdjointSolution, in_one_line
from implicit_attention.errors import (
    NOT_FINITE,
    ConvergenceError,
    ConvergenceWarning,
    NonFiniteError,
    check_choice,
    counted,
    warn,
)

MODES = ("warn", "raise", "ignore")
_HANDLES = itertools.count(1)
_REPORTS: "weakref.WeakValueDictionary[int, FailureReport]" = weakref.WeakValueDictionary()
_LOCK = threading.Lock()  # threads share layers, and so their counts
_LOOKS = 3  # calls in which a layer looks for the model around it, so that a backward pass can name it


@dataclass(frozen=True, repr=False)
class SolveRecord:
    """What is kept of a solve: its figures, detached, without the equilibrium.

    Attributes:
        residual: As in `Solution`; of an unbatched input too with a batch of one.
        steps: As in `Solution`.
        converged: As in `Solution`.
        evaluations: As in `Solution`.
        adjoint: The record of the adjoint equation, once a backward pass has solved it; None before.
        gain: As in `Solution`.
    """

    residual: Tensor
    steps: Tensor
    converged: Tensor
    evaluations: int = 0
    adjoint: "SolveRecord | None" = None
    gain: Tensor | None = None

    @classmethod
    def of(cls, solution: Solution) -> "SolveRecord":
        """Return the record of a solution."""
        residual = solution.residual.detach() if solution.residual.requires_grad else solution.residual
        return cls(residual, solution.steps, solution.converged, solution.evaluations)

    def __repr__(self) -> str:
        """Return one line."""
        adjoint = "" if self.adjoint is None else f", adjoint={self.adjoint!r}"
        return f"SolveRecord({in_one_line(self)}{adjoint})"


@dataclass
class FailureReport:
    """Says, in the way that was asked for, that solves missed their tolerance, and keeps the last one's figures.

    A warning comes at the 1st, 10th, 100th, 1000th ... failure of its kind, with their number.

    Attributes:
        on_failure: "warn", "raise" or "ignore".
        label: What the layer is, in short.
        advice: What the layer could be made with, as a sentence that follows the solver's own remedy.
        calls: Solves of the equilibrium so far.
        last: The record of the last of them.
        handle: Its number, by which a compiled graph names it, as a tensor without dimensions: what is an input of a
            graph is no part of it, so that layers of one kind share a graph. Its remainder modulo 3 is the mode.
    """

    on_failure: str = "warn"
    label: str = "fixed_point"
    advice: str = field(default="", repr=False, compare=False)
    calls: int = field(default=0, repr=False, compare=False)
    last: SolveRecord | None = field(default=None, repr=False, compare=False)
    _failures: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _owner: "weakref.ref[nn.Module] | None" = field(default=None, repr=False, compare=False)
    _model: "weakref.ref[nn.Module] | None" = field(default=None, repr=False, compare=False)
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse an unknown mode."""
        check_choice("on_failure", self.on_failure, MODES)
        self._register()

    def _register(self) -> None:
        number = 3 * next(_HANDLES) + MODES.index(self.on_failure)
        self.handle = torch.tensor(number, device="cpu")
        _REPORTS[number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"on_failure": self.on_failure, "label": self.label}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew: a copy speaks for another layer."""
        self.__init__(state["on_failure"], state.get("label", "a layer"))  # type: ignore[misc]

    @staticmethod
    def of(handle: Tensor) -> "FailureReport":
        """Return the report with a handle; one of its mode where it is gone, or belongs to another process."""
        number = int(handle)
        return _REPORTS.get(number) or FailureReport(MODES[number % 3], "a compiled layer")

    def belong_to(self, layer: nn.Module) -> None:
        """Speak for a layer, by its place in the model where there is one.

        Args:
            layer: Is not kept alive.
        """
        self._owner = weakref.ref(layer)

    def __call__(self, solution: Solution, name: str, solver: Method) -> None:
        """Keep the figures of a solution, and report it if it failed.

        Args:
            solution: The outcome.
            name: What was solved, "equilibrium" or "adjoint equation".
            solver: What solved it.

        Raises:
            ConvergenceError: If it failed and `on_failure` is "raise".
            NonFiniteError: If the residual of an equilibrium is NaN or Inf, and `on_failure` is not "ignore".
        """
        self.keep(solution, name)
        if self._owner is not None and self._model is None and self.calls <= _LOOKS:
            self._look_around()
        if self.on_failure == "ignore" or bool(solution.converged.all()):
            return
        if name == "equilibrium" and not bool(solution.residual.isfinite().all()):  # of a solver that does not look
            raise NonFiniteError(NOT_FINITE)
        count = self._count(name)
        if not self._due(count):
            return
        failed = int((~solution.converged).sum())
        trust = "" if name == "equilibrium" else "The gradient is not to be trusted. "
        self._say(
            f"the {name} was not solved: {failed} of {solution.converged.numel()} systems are above tolerance "
            f"after {counted(int(solution.steps.max()), 'step')} "
            f"(largest residual {float(solution.residual.max()):.2e}). "
            f"{trust}{solver.remedy}{self.advice}",
            count,
        )

    def keep(self, solution: Solution, name: str = "equilibrium") -> None:
        """Keep the figures of a solution as those of the last solve.

        Args:
            solution: The outcome.
            name: What was solved.
        """
        if torch._C._functorch.is_functorch_wrapped_tensor(solution.residual):
            return  # it lives no longer than the transform
        record = SolveRecord.of(solution)
        if name == "equilibrium":
            self.calls += 1
            self.last = record
        elif self.last is not None:
            self.last = replace(self.last, adjoint=record)

    def keep_gain(self, gain: Tensor) -> None:
        """Keep the gains of the last solve, as in `Solution`, with its figures."""
        if self.last is not None and not (torch.compiler.is_compiling() or maps.transforms_active()):
            self.last = replace(self.last, gain=gain.detach())

    def adjoint(self, found: AdjointSolution, grad: Tensor, solver: Method) -> None:
        """Report an adjoint equation that was solved directly, if it failed or its gradient is not to be trusted.

        Args:
            found: The outcome.
            grad: Cotangent of the equilibrium, `[B, N, D]`.
            solver: What solved it.

        Raises:
            ConvergenceError: If `on_failure` is "raise".
        """
        steps, none = torch.full_like(found.residual, found.steps, dtype=torch.long), found.residual[None]
        solution = Solution(grad, found.residual, steps, found.converged, none, none, found.steps)
        self(solution, "adjoint equation", solver)
        if found.near_singular:
            self.near_singular(found.near_singular, grad.shape[:-1].numel())

    def near_singular(self, rows: int, of: int) -> None:
        """Report rows where the derivative of the equilibrium does not exist to working precision.

        Args:
            rows: How many have an eigenvalue of their own Jacobian within 1e-3 of 1.
            of: Of how many.

        Raises:
            ConvergenceError: If `on_failure` is "raise".
        """
        if self.on_failure == "ignore":
            return
        count = self._count("near-singular gradient")
        if self._due(count):
            self._say(
                f"the gradient is not to be trusted: {rows} of {of} rows have an eigenvalue within 1e-3 of 1, "
                "where the equilibrium has no derivative. Keep gains down (weight decay, qk_norm, "
                'diagnostics.gain_penalty), or use self_query="input", whose gains are 0.',
                count,
            )

    def once(self, sentence: str, category: type[Warning]) -> None:
        """Warn of something that is no failure, the first time.

        Args:
            sentence: What is said of the layer.
            category: Of the warning.
        """
        if self._count(category.__name__) == 1:
            warn(f"{self.where()}: {sentence} Said once for this layer.", category)

    def said(self, category: type[Warning]) -> bool:
        """Return whether `once` has spoken.

        Args:
            category: Of the warning.
        """
        return category.__name__ in self._failures

    def where(self) -> str:
        """Return what the layer is called: its path in its model, if one is known, and its label."""
        owner = None if self._owner is None else self._owner()
        if owner is None:
            return self.label
        self._look_around()
        model = None if self._model is None else self._model()
        paths = () if model is None else (path for path, module in model.named_modules() if module is owner)
        path = next(iter(paths), "")
        path = path.replace("_orig_mod.", "").removesuffix("_orig_mod")  # torch.compile wraps modules
        return f"{path} ({self.label})" if path else self.label

    def _look_around(self) -> None:
        """Remember the model whose call this is part of, if it is."""
        outermost = _outermost_module()
        if outermost is not None and self._owner is not None and outermost is not self._owner():
            self._model = weakref.ref(outermost)

    def _count(self, kind: str) -> int:
        with _LOCK:
            self._failures[kind] = self._failures.get(kind, 0) + 1
            return self._failures[kind]

    def _due(self, count: int) -> bool:
        """Whether a failure is to be told: every one that raises; of warnings the 1st, 10th, 100th ..."""
        return self.on_failure == "raise" or power_of_ten(count)

    def _say(self, sentence: str, count: int) -> None:
        call = f" in call {self.calls}" if self._owner is not None else ""
        message = f"{self.where()}{call}: {sentence}"
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        if self._owner is not None:
            so_far = "" if count == 1 else f" {count} failures of this kind so far."
            message += f"{so_far} Said again at the {10 * count}th."
        warn(message, ConvergenceWarning)


class Reporting(nn.Module):
    """A module that solves equations: it reports failures by its name, and keeps the figures of the last solve."""

    _report: FailureReport

    def _begin_reports(self, on_failure: str, label: str) -> None:
        self._report = FailureReport(on_failure, label)
        self._report.belong_to(self)

    @property
    def on_failure(self) -> str:
        """What a solve that misses its tolerance does, one of "warn", "raise" and "ignore"."""
        return self._report.on_failure

    @property
    def last_solve(self) -> SolveRecord | None:
        """The figures of the last solve, detached, with those of its adjoint after a backward pass; None before any.

        They are no part of the state dict. A copy of the layer begins with None.
        """
        return self._report.last

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose reports speak of itself."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._report.belong_to(self)


def power_of_ten(count: int) -> bool:
    """Return whether something that has come up this often is told again: the 1st, 10th, 100th ... time.

    Args:
        count: How often, at least 1.
    """
    return not str(count)[1:].strip("0") and str(count)[0] == "1"


def _outermost_module() -> nn.Module | None:
    """The module whose call all others under way are part of, read from the stack; None outside of any."""
    frame: FrameType | None = sys._getframe(1)
    outermost = None
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            outermost = frame
        frame = frame.f_back
    found: nn.Module | None = None if outermost is None else outermost.f_locals["self"]
    return found
