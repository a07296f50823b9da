"""What all solvers share: the only loop, its stopping rule, its bookkeeping and its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium import residual as residuals
from implicit_attention.errors import NonFiniteError, check_choice, check_positive, counted

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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


class System:
    """The equation `y = F(y)` in the form of the solvers: S independent systems of n unknowns, iterates `[S, n]`.

    Iterates are float32 or wider, also if the map computes in a half type, so that solver algebra loses no digits.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], y0: Tensor, system_ndim: int, *, linear: bool = False
    ) -> None:
        """Wrap a map.

        Args:
            function: Map from tensors like y0 to tensors like y0.
            y0: Start; its leading `system_ndim` dimensions count the systems.
            system_ndim: Number of these dimensions.
            linear: Whether the map is affine. Then a Jacobian product is a difference of two evaluations.
        """
        self.evaluations = 0
        self._function = function
        self._like = y0
        self._count = y0.shape[:system_ndim].numel()
        self._linear = linear
        self._origin: Tensor | None = None

    def flatten(self, y: Tensor) -> Tensor:
        """Return `y` as `[S, n]` in the solvers' dtype."""
        return y.reshape(self._count, -1).to(torch.promote_types(y.dtype, torch.float32))

    def unflatten(self, y: Tensor) -> Tensor:
        """Return a flat iterate in the shape and dtype of the start."""
        return y.to(self._like.dtype).reshape(self._like.shape)

    def __call__(self, y: Tensor) -> Tensor:
        """Return `F(y)`, flat."""
        self.evaluations += 1
        return self.flatten(self._function(self.unflatten(y)))

    def jvp(self, y: Tensor, tangent: Tensor) -> Tensor:
        """Return the product of the Jacobian of F at `y` with `tangent`, both flat."""
        if self._linear:
            if self._origin is None:
                self._origin = self(torch.zeros_like(y))
            return self(tangent) - self._origin
        self.evaluations += 1
        out = maps.jvp(self._function, self.unflatten(y), self.unflatten(tangent))
        return self.flatten(out)


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
    ) -> "AdjointSolution":
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
        return f"Raise max_steps (it is {self.max_steps}) or the tolerances, or use NewtonKrylov()."

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
