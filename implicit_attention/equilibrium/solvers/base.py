"""What every solver shares: the only loop, its stopping rule, its bookkeeping and its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium import residual as residuals
from implicit_attention.errors import NonFiniteError, check_choice, check_positive

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, repr=False)
class Solution:
    """What a solve returns, always the same.

    The residual is the largest componentwise difference `|F(value) - value|`: it is measured at the value
    returned, and means the same whatever the sequence length. An independent system is a sample `[B]`, or a
    token `[B, N]` where tokens decouple; causal maps report row by row, `[B, N]`.

    Attributes:
        value: The equilibrium, of the shape and dtype of the start.
        residual: Absolute residual per system, at `value`.
        steps: Steps taken per system (for rows of one system: until that row last was above tolerance).
        converged: Whether the residual is within tolerance, per system.
        abs_trace: Absolute residual at each iterate, the start first, `[steps + 1, *systems]`. A direct solver such as
            `ForwardSubstitution` has no iterates: `[1, *systems]`, the residual at `value`.
        rel_trace: The same, relative to the largest component of `F(y)`.
        evaluations: How often the map or its Jacobian was applied, to the whole batch at once.
        history: Every iterate, the start first, if it was asked for; direct solvers have none and refuse.
        gain: Spectral radius of each row's own Jacobian, `[B, N]`, if it was asked for; its maximum is that of the
            causal map.
        memo: What a direct solver found on the way and its adjoint needs; for `ForwardSubstitution` the queries
            at the equilibrium `[B, N, G, d]`, the log-sum-exp `[B, H, N]`, and the queries' inverse norms.
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
    memo: tuple[Tensor, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        """Return one line: shape, steps, residual, and how many systems converged."""
        dtype = str(self.value.dtype).removeprefix("torch.")
        return f"Solution({dtype}{list(self.value.shape)}, {in_one_line(self)})"

    @property
    def stats(self) -> dict[str, Any]:
        """The solve's statistics as plain tensors, under the names torchdeq gives them."""
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
    return f"{within} of {converged.numel()} converged, at most {most} steps, largest residual {worst:.1e}"


class System:
    """The equation `y = F(y)` as solvers see it: S independent systems of n unknowns, iterates `[S, n]`.

    Iterates are float32 or wider whatever the map computes in, so that solver algebra does not lose digits.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], y0: Tensor, system_ndim: int, *, linear: bool = False
    ) -> None:
        """Wrap a map.

        Args:
            function: Map from tensors like y0 to tensors like y0.
            y0: Start; its leading `system_ndim` dimensions count the systems.
            system_ndim: Number of those dimensions.
            linear: Whether the map is affine; then Jacobian products are differences of the map itself.
        """
        self.evaluations = 0
        self._function = function
        self._like = y0
        self._count = y0.shape[:system_ndim].numel()
        self._linear = linear
        self._origin: Tensor | None = None

    def flatten(self, y: Tensor) -> Tensor:
        """Return `y` as `[S, n]` in the dtype that solvers work in."""
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
    """Base of everything that solves `y = F(y)`.

    Attributes:
        rtol: Relative tolerance; None for the default of the dtype (float64 1e-10, float32 1e-5, float16
            4e-3, bfloat16 3e-2).
        atol: Absolute tolerance; None for the same default (0 when solving an adjoint, which has no scale).
    """

    rtol: float | None = None
    atol: float | None = None

    unrollable: ClassVar[bool] = True  # whether backpropagation through the steps themselves makes sense

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return f"Raise the tolerances ({type(self).__name__}(rtol=..., atol=...))."

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def tolerances(self, dtype: torch.dtype, *, linear: bool = False) -> tuple[float, float]:
        """Return the relative and the absolute tolerance for a dtype.

        Args:
            dtype: Of the unknown.
            linear: Whether the equation is an adjoint, whose unknown has no scale of its own.

        Returns:
            `rtol` and `atol`.
        """
        default = _TOLERANCES.get(dtype, 1e-5)
        rtol = default if self.rtol is None else self.rtol
        return rtol, (0.0 if linear else default) if self.atol is None else self.atol


@dataclass(frozen=True, kw_only=True)
class DirectSolver(Method, ABC):
    """Base of the solvers that know the structure of a map and need not iterate on the whole of it.

    Attributes:
        fallback: The iterative solver for equations derived from the map whose structure is not known.
    """

    unrollable: ClassVar[bool] = False

    fallback: "Solver"

    @abstractmethod
    def equilibrium(self, function: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype) -> Solution:
        """Return the equilibrium, with a memo for `adjoint`.

        Args:
            function: The map.
            args: Its tensors.
            dtype: Of the equilibrium.
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
        """Solve `lam = grad + J^T lam` at the equilibrium `y` and return what it gives the map's tensors.

        Args:
            function: The map.
            args: Its tensors.
            y: The equilibrium.
            memo: What `equilibrium` left; empty if another solver found it.
            grad: Cotangent of y, finite.
            needs: For each of `args`, whether its gradient is wanted.
        """


@dataclass(frozen=True)
class AdjointSolution:
    """The outcome of an adjoint equation that was solved directly.

    Attributes:
        by_arg: The gradient of each tensor of the map, None where it was not wanted.
        residual: Of the adjoint equation per sample, `[B]`.
        converged: Whether that is within tolerance, `[B]`.
        steps: Most sweeps that a block took.
        near_singular: Rows with a gain so close to 1 that the gradient is not to be trusted.
    """

    by_arg: list[Tensor | None]
    residual: Tensor
    converged: Tensor
    steps: int
    near_singular: int = 0


@dataclass(frozen=True, kw_only=True)
class Solver(Method, ABC):
    """Base of the iterative solvers: a record of settings with `init` and `step`; the loop is `solve`.

    Attributes:
        max_steps: Steps after which a system that is not within `atol + rtol max|F(y)|` is reported.
        kernel: What measures residuals: "torch"; "triton" (the extra `gpu`; CUDA devices; not run on a device yet), in
            one pass over memory; or "auto", which is torch until that has been measured.
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
            active: `[S]`, which systems still move; what is returned for the others is discarded.
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

    A system that has converged is frozen, so on a device that would have to be waited for it does no harm to look only
    now and then whether any is left (`looks_every`); steps taken beyond that are not reported. One that does not
    converge returns the iterate with its smallest residual; but when autograd records the steps (unrolling), the last
    iterate, which is what the graph leads to.

    Args:
        solver: The method, with its tolerances.
        function: Map from tensors like y0 to tensors like y0.
        y0: Start.
        system_ndim: How many leading dimensions of y0 count independent systems.
        row_ndim: How many count the rows that are judged one by one, at least `system_ndim` (the default).
        linear: Whether the map is affine, as an adjoint equation is.
        history: Whether to keep every iterate.

    Returns:
        The solution; that it converged is for the caller to check.

    Raises:
        NonFiniteError: If the map gives NaN or Inf at the start.
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
    """Return how many steps are taken between two looks at whether all systems are done.

    Each look waits for everything that the device was given to do.

    Args:
        device: Where the systems are.
    """
    return 1 if device.type == "cpu" else 4


def nothing_to_solve(y0: Tensor, row_ndim: int) -> Solution:
    """Return the solution of an empty batch.

    Args:
        y0: The start, without elements.
        row_ndim: How many leading dimensions count the rows.
    """
    none = torch.zeros(y0.shape[:row_ndim], dtype=torch.promote_types(y0.dtype, torch.float32), device=y0.device)
    return Solution(y0, none, none.long(), none == 0, none[None], none[None])


class _Bookkeeping:
    """Residuals, steps and best iterates; nothing here is differentiated."""

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
        self.needed = torch.ones((), dtype=torch.long, device=y0.device)  # iterates up to which a system still moved

    @torch.no_grad()
    def observe(self, y: Tensor, f: Tensor) -> Tensor:
        """Measure an iterate `[S, n]`; return which systems must go on, `[S]`."""
        residual, size = self.measure(y, f, self.rows)
        if self.traces:
            before, before_size = self.traces[-1]
            frozen = ~self.active[:, None]
            residual, size = torch.where(frozen, before, residual), torch.where(frozen, before_size, size)
        finite = torch.isfinite(residual).all(-1)
        if not self.traces and not bool(finite.all()):
            raise NonFiniteError("the map gave NaN or Inf at the first iterate")
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
        """Return the result: the last iterate, or where a system failed its best one."""
        assert self.best is not None
        del self.traces[int(self.needed) :]
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
