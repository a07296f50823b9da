"""What all solvers share: the only loop, its stopping rule and its bookkeeping."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_attention.equilibrium import residual as residuals
from implicit_attention.equilibrium.solvers.solution import AdjointSolution, Solution
from implicit_attention.equilibrium.solvers.system import System
from implicit_attention.errors import NonFiniteError, check_choice, check_positive

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods for `y = F(y)`.

    Attributes:
        rtol: Relative tolerance; None for the default of the dtype (float64 1e-10, float32 1e-5, float16
            4e-3, bfloat16 3e-2).
        atol: Absolute tolerance; None for the same default, or for 0 in an adjoint equation, which has no scale.
    """

    rtol: float | None = None
    atol: float | None = None

    unrollable: ClassVar[bool] = True  # whether autograd can differentiate the steps

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return f"Raise the tolerances ({type(self).__name__}(rtol=..., atol=...))."

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.rtol is not None:
            check_positive("rtol", self.rtol)
        if self.atol is not None:
            check_positive("atol", self.atol, zero=True)

    def tolerances(self, dtype: torch.dtype, *, linear: bool = False) -> tuple[float, float]:
        """Return the relative and the absolute tolerance for a dtype.

        Args:
            dtype: Dtype of the unknown.
            linear: Whether the equation is an adjoint: its unknown has no scale of its own.

        Returns:
            `rtol` and `atol`.
        """
        default = _TOLERANCES.get(dtype, 1e-5)
        rtol = default if self.rtol is None else self.rtol
        return rtol, (0.0 if linear else default) if self.atol is None else self.atol


@dataclass(frozen=True, kw_only=True)
class DirectSolver(Method, ABC):
    """Base of the solvers that use the structure of a map instead of iterating on the whole map.

    Attributes:
        fallback: Iterative solver for derived equations without this structure.
    """

    unrollable: ClassVar[bool] = False

    fallback: "Solver"

    @abstractmethod
    def equilibrium(self, function: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype) -> Solution:
        """Return the equilibrium, with a memo for `adjoint`.

        Args:
            function: The map.
            args: Its tensors.
            dtype: Dtype of the equilibrium.
        """

    @abstractmethod
    def adjoint(
        self,
        function: Callable[..., Tensor],
        args: tuple[Tensor, ...],
        y: Tensor,
        memo: tuple[Tensor, ...],
        grad: Tensor,
        needs: tuple[bool, ...],
    ) -> AdjointSolution:
        """Solve `lam = grad + J^T lam` at the equilibrium `y` and return the gradients of the map's tensors.

        Args:
            function: The map.
            args: Its tensors.
            y: The equilibrium.
            memo: The memo of `equilibrium`; empty if another solver found the equilibrium.
            grad: Cotangent of y, finite.
            needs: For each of `args`, whether its gradient is needed.
        """

    @abstractmethod
    def per_sample(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """Return, for each of the map's tensors, whether its first dimension counts samples.

        Args:
            function: The map.
            args: Its tensors.
        """


@dataclass(frozen=True, kw_only=True)
class Solver(Method, ABC):
    """Base of the iterative solvers: a record of settings with `init` and `step`. The loop is `solve`.

    Attributes:
        max_steps: Maximum number of steps. A system that is then not within `atol + rtol max|F(y)|` is reported.
        kernel: What measures residuals: "torch"; "triton", one pass over memory (the extra `gpu`; CUDA devices; not run
            on a device yet); or "auto", which is "torch" until Triton's kernel has been measured.
    """

    max_steps: int = 50
    kernel: str = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("max_steps", self.max_steps, integer=True)
        check_choice("kernel", self.kernel, residuals.KERNELS)

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return f"Raise max_steps (it is {self.max_steps}) or the tolerances, or use NewtonKrylov(), which is slow."

    @abstractmethod
    def init(self, y: Tensor) -> Any:
        """Return the state before the first step, for a start `[S, n]`."""

    @abstractmethod
    def step(self, system: System, y: Tensor, f: Tensor, state: Any, active: Tensor) -> tuple[Tensor, Any]:
        """Return the next iterate and state.

        Args:
            system: The equation.
            y: Iterate `[S, n]`.
            f: `F(y)`, `[S, n]`.
            state: What `init` or the previous step returned.
            active: `[S]`, which systems are not solved yet. The loop discards the result for the others.
        """


def solve(
    solver: Solver,
    function: Callable[[Tensor], Tensor],
    y0: Tensor,
    *,
    system_ndim: int = 1,
    row_ndim: int | None = None,
    linear: bool = False,
    history: bool = False,
) -> Solution:
    """Iterate `solver` until every system is within tolerance, has failed, or `max_steps` are taken.

    A converged system is frozen. So on a GPU the host reads only every few steps whether any system is left
    (`looks_every`); the extra steps change nothing and are not reported. A system that does not converge returns the
    iterate with its smallest residual. If autograd records the steps (unrolling), it returns the last iterate, since
    the graph belongs to it.

    Args:
        solver: The method, with its tolerances.
        function: Map from tensors like y0 to tensors like y0.
        y0: Start.
        system_ndim: How many leading dimensions of y0 count independent systems.
        row_ndim: How many count the rows that are judged one by one; at least `system_ndim`, the default.
        linear: Whether the map is affine, as an adjoint equation is.
        history: Whether to keep every iterate.

    Returns:
        The solution. The caller checks whether it converged.

    Raises:
        NonFiniteError: If the map returns NaN or Inf at the start.
    """
    system = System(function, y0, system_ndim, linear=linear)
    rule = _Bookkeeping(solver, y0, system_ndim, row_ndim or system_ndim, linear)
    y = system.flatten(y0)
    iterates = [y0] if history else None
    state, look = solver.init(y), looks_every(y0.device)
    for step in range(solver.max_steps + 1):
        f = system(y)
        active = rule.observe(y, f)
        if step == solver.max_steps or (step % look == 0 and not bool(active.any())):
            break
        proposal, state = solver.step(system, y, f, state, active)
        y = torch.where(active[:, None], proposal, y)
        if iterates is not None:
            iterates.append(system.unflatten(y))
    return rule.solution(system, y, iterates)


def looks_every(device: torch.device) -> int:
    """Return after how many steps the host reads whether all systems are done.

    On a GPU each read waits for all launched work, and the steps that it can save cost launches.

    Args:
        device: Device of the systems.
    """
    return 1 if device.type == "cpu" else 4


class _Bookkeeping:
    """Residuals, steps and best iterates. Nothing here is differentiated."""

    def __init__(self, solver: Solver, y0: Tensor, system_ndim: int, row_ndim: int, linear: bool) -> None:
        self.rtol, self.atol = solver.tolerances(y0.dtype, linear=linear)
        self.measure = residuals.measure_with(solver.kernel, y0)
        self.shape = y0.shape[:row_ndim]
        count = y0.shape[:system_ndim].numel()
        self.rows = (count, y0.shape[system_ndim:row_ndim].numel())
        self.active = torch.ones(count, dtype=torch.bool, device=y0.device)
        self.steps = torch.zeros(self.rows, dtype=torch.long, device=y0.device)
        self.traces: list[tuple[Tensor, Tensor]] = []
        self.best: tuple[Tensor, Tensor, Tensor] | None = None  # iterate [S, n], its residual and size [S, R]
        self.converged = torch.zeros(self.rows, dtype=torch.bool, device=y0.device)
        self.needed = torch.ones((), dtype=torch.long, device=y0.device)  # iterates until the last system stopped

    @torch.no_grad()
    def observe(self, y: Tensor, f: Tensor) -> Tensor:
        """Measure an iterate `[S, n]`; return which systems are not solved yet, `[S]`."""
        residual, size = self.measure(y, f, self.rows)
        if self.traces:
            before, before_size = self.traces[-1]
            frozen = ~self.active[:, None]
            residual, size = torch.where(frozen, before, residual), torch.where(frozen, before_size, size)
        finite = torch.isfinite(residual).all(-1)
        if not self.traces and not bool(finite.all()):
            raise NonFiniteError("the map gave NaN or Inf at the start: check `y0`, `args` and the map's parameters")
        self.traces.append((residual, size))
        now = (y, residual, size)
        if self.best is None:
            self.best = now
        else:
            better = (finite & (residual.amax(-1) < self.best[1].amax(-1)))[:, None]
            self.best = tuple(torch.where(better, new, old) for new, old in zip(now, self.best, strict=True))  # type: ignore[assignment]
        self.converged = self._within(residual, size)
        self.steps = torch.where(~self.converged & self.active[:, None], len(self.traces), self.steps)
        self.active = self.active & finite & ~self.converged.all(-1)
        self.needed = torch.where(self.active.any(), len(self.traces) + 1, self.needed)
        return self.active

    def _within(self, residual: Tensor, size: Tensor) -> Tensor:
        return torch.isfinite(residual) & (residual <= self.atol + self.rtol * size)

    def solution(self, system: System, y: Tensor, history: list[Tensor] | None) -> Solution:
        """Return the result: the last iterate, or the best one of a system that failed."""
        assert self.best is not None
        del self.traces[int(self.needed) :]  # iterates between the last change and the host's read
        history = None if history is None else history[: len(self.traces)]
        failed = ~self.converged.all(-1)
        residual, size = self.traces[-1]
        if bool(failed.any()) and not y.requires_grad:
            best, best_residual, best_size = self.best
            y = torch.where(failed[:, None], best, y)
            residual = torch.where(failed[:, None], best_residual, residual)
            size = torch.where(failed[:, None], best_size, size)
        taken = len(self.traces) - 1
        absolute = torch.stack([r for r, _ in self.traces]).reshape(-1, *self.shape)
        sizes = torch.stack([s for _, s in self.traces]).reshape(-1, *self.shape)
        return Solution(
            value=system.unflatten(y),
            residual=residual.reshape(self.shape),
            steps=self.steps.clamp_max(taken).reshape(self.shape),
            converged=self._within(residual, size).reshape(self.shape),
            abs_trace=absolute,
            rel_trace=absolute / sizes.clamp_min(torch.finfo(sizes.dtype).tiny),
            evaluations=system.evaluations,
            history=history,
        )
