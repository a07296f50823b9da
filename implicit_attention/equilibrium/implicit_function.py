"""A solve as one autograd function, with the gradient of the implicit function theorem.

Forward `y = F(y, args)`, backward `lam = g + J^T lam`, and `lam^T dF/dargs` as the gradients of `args`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.linear import largest
from implicit_attention.equilibrium.problem import Problem, Report
from implicit_attention.equilibrium.solvers import DirectSolver, Method, Solution
from implicit_attention.errors import Came, bad_value


@dataclass
class Run:
    """One solve inside autograd: its settings, and what the forward pass keeps for the backward pass."""

    problem: Problem
    adjoint_solver: Method
    needs: tuple[bool, ...] = ()
    record: bool = True
    history: bool = False
    linearization: maps.Linearization | None = None
    evaluations: int = 0
    iterates: list[Tensor] | None = field(default=None, repr=False)

    def forward(self, y0: Tensor, args: tuple[Tensor, ...]) -> Solution:
        """Solve, and keep the graph of the last evaluation: a first-order backward pass needs no more."""
        # Asked here and again in the backward pass: a level of torch.func hides what the levels below it need.
        self.needs = tuple(a.requires_grad for a in args)

        def evaluate(y: Tensor) -> Tensor:
            if maps.transforms_active():  # inside a Jacobian product of the solver
                return self.problem.function(y, *args)
            self.linearization = None  # free the previous graph before the next one is built
            self.linearization = maps.Linearization(self.problem.function, y, args, self.needs)
            return self.linearization.value

        call = evaluate if self.record else lambda y: self.problem.function(y, *args)
        if isinstance(self.problem.solver, DirectSolver):
            solution = self._solve_directly(self.problem.solver, y0, args)
        else:
            solution = self.problem.solve(call, y0, history=self.history)
        if self.linearization is not None:
            self._refuse_closures(self.linearization)
        if _kept_elsewhere():
            self.linearization = None
        self.evaluations, self.iterates = solution.evaluations, solution.history
        return solution

    def _solve_directly(self, solver: DirectSolver, y0: Tensor, args: tuple[Tensor, ...]) -> Solution:
        """Solve with a direct solver."""
        if self.history:
            raise bad_value(
                "history", f"False with solver={type(solver).__name__}(...)", True,
                "It keeps no iterates of the whole: make the layer with solver=Picard() or "
                "Anderson(), which do.",
            )  # fmt: skip
        with torch.autocast(y0.device.type, enabled=False):  # the solver chooses its precision itself
            solution = solver.equilibrium(self.problem.function, args, y0.dtype)
        self.problem.report(solution, self.problem.name, solver)
        return solution

    def _refuse_closures(self, linearization: maps.Linearization) -> None:
        captured = linearization.captured()
        if captured is not None:
            raise impure(f"a tensor of shape {tuple(captured.shape)} that requires grad")

    def need(self, needs: tuple[bool, ...]) -> None:
        """Take note of the arguments that a backward pass differentiates by. A kept graph may lack some of them."""
        known = self.needs or (False,) * len(needs)  # mapped solves are made by runs of their own
        if any(new and not old for new, old in zip(needs, known, strict=True)):
            self.needs, self.linearization = needs, None

    def backward(
        self, y: Tensor, args: tuple[Tensor, ...], memo: tuple[Tensor, ...], grad: Tensor
    ) -> list[Tensor | None]:
        """Return the gradients of `args`: first order from the kept graph, higher orders by recursion."""
        if torch.is_grad_enabled() or maps.transforms_active():
            return self._composable_backward(y, args, grad)
        if isinstance(self.adjoint_solver, DirectSolver):
            given = (self.problem.function, args, y, memo, grad, self.needs)
            return direct_gradients(self.adjoint_solver, *given, self.problem.report)
        kept = self.linearization
        if kept is None or not torch.equal(kept.y, y):
            kept = maps.Linearization(self.problem.function, y, args, self.needs)
        grad, broken = _without_broken(grad)
        lam, by_arg = self._iterate_adjoint(kept, grad)
        return by_arg if broken is None else kept.vjp(lam.masked_fill(_like(lam, broken), torch.nan))[1]

    def _iterate_adjoint(self, linearization: maps.Linearization, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        last: tuple[Tensor, list[Tensor | None]] | None = None

        def adjoint_map(lam: Tensor) -> Tensor:
            nonlocal last
            pulled, by_arg = linearization.vjp(lam)
            last = (lam, by_arg)
            return grad + pulled

        lam = self._adjoint_problem(self.problem.function).solve(adjoint_map, grad).value
        if last is not None and torch.equal(last[0], lam):
            return last  # the last product was taken at the solution, so it holds the gradients of the arguments
        return lam, linearization.vjp(lam)[1]

    def _composable_backward(self, y: Tensor, args: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
        """As `backward`, in differentiable operations: the adjoint is the fixed point of a linear map."""
        function = self.problem.function
        smooth = [i for i, a in enumerate(args) if a.is_floating_point() or a.is_complex()]

        def filled(values: tuple[Tensor, ...]) -> list[Tensor]:
            full = list(args)
            for i, value in zip(smooth, values, strict=True):
                full[i] = value
            return full

        def adjoint_map(lam: Tensor, g: Tensor, at: Tensor, *values: Tensor) -> Tensor:
            pull = torch.func.vjp(lambda t: function(t, *filled(values)), at)[1]
            return g + pull(lam)[0]  # type: ignore[no-any-return]

        inputs = (grad, y, *(args[i] for i in smooth))
        # A direct solver knows the structure of F, not of this map of (lam, grad, y, ...): take its fallback.
        solver = self.adjoint_solver.fallback if isinstance(self.adjoint_solver, DirectSolver) else self.adjoint_solver
        problem = replace(self._adjoint_problem(adjoint_map), solver=solver)
        run = Run(problem, solver)
        lam = solve_opaquely(run, grad, inputs).value
        pull = torch.func.vjp(lambda *values: function(y, *filled(values)), *inputs[2:])[1]
        found = dict(zip(smooth, pull(lam), strict=True))
        return [found.get(i) for i in range(len(args))]

    def _adjoint_problem(self, function: maps.MapFunction) -> Problem:
        return replace(
            self.problem, function=function, solver=self.adjoint_solver, name="adjoint equation", linear=True
        )


def solve_opaquely(run: Run, y0: Tensor, args: tuple[Tensor, ...]) -> Solution:
    """Return the solution of a run, inside one autograd function: neither autograd nor torch.func sees the steps."""
    found = _ImplicitFunction.apply(run, y0, *args)  # type: ignore[no-untyped-call]
    value, residual, steps, converged, abs_trace, rel_trace, *memo = found
    return Solution(
        value, residual, steps, converged, abs_trace, rel_trace, run.evaluations, run.iterates, memo=tuple(memo)
    )


def direct_gradients(
    solver: DirectSolver,
    function: maps.MapFunction,
    args: tuple[Tensor, ...],
    y: Tensor,
    memo: tuple[Tensor, ...],
    grad: Tensor,
    needs: tuple[bool, ...],
    report: Report,
) -> list[Tensor | None]:
    """Return the gradients of a map's tensors, by a direct solver's adjoint.

    A sample with NaN or Inf in its cotangent does not reach the others. The gradients of its own tensors are NaN, and
    so are those of tensors that samples share.

    Args:
        solver: The solver.
        function: As in `DirectSolver.adjoint`, as are all up to `needs`.
        args: Likewise.
        y: Likewise.
        memo: Likewise.
        grad: Likewise, but it may hold NaN or Inf.
        needs: Likewise.
        report: Is told how it went.

    Returns:
        The gradients, None where they are not needed.
    """
    grad, broken = _without_broken(grad)
    with torch.autocast(y.device.type, enabled=False):  # the solver chooses its precision itself
        found = solver.adjoint(function, args, y, memo, grad, needs)
    report.adjoint(found, grad, solver)
    if broken is None:
        return found.by_arg
    own = solver.per_sample(function, args)
    return [
        None if g is None else g.masked_fill(_like(g, broken), torch.nan) if is_own else torch.full_like(g, torch.nan)
        for g, is_own in zip(found.by_arg, own, strict=True)
    ]


def impure(what: str) -> ValueError:
    """Return the error that a map closes over something, in words."""
    return bad_value(
        "function", "a pure function of (y, *args)", Came(f"one that closes over {what}"),
        "The gradient of this tensor would be lost. Pass the tensor in `args`, or pass the nn.Module itself as the "
        "function.",
    )  # fmt: skip


def _kept_elsewhere() -> bool:
    """Whether hooks say where tensors for the backward pass are kept, as in activation checkpointing."""
    # A graph that is recorded then asks them for its tensors at each product, and checkpointing computes all of them
    # anew each time. The backward pass records a graph of its own instead.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


_FIGURES = 6  # outputs before the memo: value, residual, steps, converged, abs_trace, rel_trace


def _without_broken(grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """A cotangent with zeros in samples that hold NaN or Inf, and which these are, `[B]`; None if there are none."""
    broken = ~torch.isfinite(largest(grad))
    return (grad.masked_fill(_like(grad, broken), 0.0), broken) if bool(broken.any()) else (grad, None)


def _like(t: Tensor, by_sample: Tensor) -> Tensor:
    """A mask of samples, `[B]`, with as many dimensions as a tensor."""
    return by_sample.reshape(-1, *[1] * (t.dim() - 1))


def _refuse_old_batching(grad: Tensor) -> None:
    """Refuse torch.autograd's own mapping over cotangents: its tensors know too few operations for a solve."""
    try:
        grad.flatten(-1)  # changes nothing, and is one of them
    except RuntimeError as error:
        raise NotImplementedError(
            "An implicit solve cannot take cotangents that torch.autograd batches (`is_grads_batched=True`, "
            "`jacobian(..., vectorize=True)`). Use torch.func.jacrev, or torch.func.vmap of torch.func.vjp."
        ) from error


class _ImplicitFunction(torch.autograd.Function):
    @staticmethod
    def forward(run: Run, y0: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        s = run.forward(y0, args)
        value = s.value if s.memo else s.value.clone()  # an iterate may be the start: outputs must not alias inputs
        return value, s.residual, s.steps, s.converged, s.abs_trace, s.rel_trace, *s.memo

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, _, *args = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # None instead of tensors of zeros for outputs without a gradient
        ctx.count = len(args)
        ctx.save_for_backward(output[0], *args, *output[_FIGURES:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return tuple(None for _ in ctx.needs_input_grad)
        _refuse_old_batching(grad)
        y, *saved = ctx.saved_tensors
        args, memo = tuple(saved[: ctx.count]), tuple(saved[ctx.count :])
        ctx.run.need(ctx.needs_input_grad[2:])
        # The map enters the autocast of the forward pass itself. The products of the adjoint stay as wide as they are.
        with torch.autocast(grad.device.type, enabled=False):
            return (None, None, *ctx.run.backward(y, args, memo, grad))

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "An implicit solve has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad). Use "
            "reverse mode (torch.func.vjp, jacrev), or adjoint=Unrolled(), whose steps autograd sees."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Run, y0: Tensor, *args: Tensor) -> Any:
        """Solve the mapped equations as one more dimension of independent systems; direct solvers take each in turn."""
        if not info.batch_size:
            raise ValueError("torch.func.vmap over no samples at all: an implicit solve needs at least one. Call the "
                             "layer without vmap, with an empty batch [0, N, D].")  # fmt: skip
        if isinstance(run.problem.solver, DirectSolver):
            solved = [
                _ImplicitFunction.apply(  # type: ignore[no-untyped-call]
                    replace(run),
                    *(t if d is None else t.select(d, i) for t, d in zip((y0, *args), in_dims[1:], strict=True)),
                )
                for i in range(info.batch_size)
            ]
            return tuple(torch.stack(part) for part in zip(*solved, strict=True)), (0,) * len(solved[0])
        dims = [None if d is None else 0 for d in in_dims[2:]]
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims[2:], strict=True)]
        start = y0.expand(info.batch_size, *y0.shape).clone() if in_dims[1] is None else y0.movedim(in_dims[1], 0)
        problem = replace(
            run.problem,
            function=torch.func.vmap(run.problem.function, in_dims=(0, *dims)),
            system_ndim=run.problem.system_ndim + 1,
            row_ndim=run.problem.row_ndim + 1,
        )
        inner = replace(run, problem=problem)
        outputs = _ImplicitFunction.apply(inner, start, *moved)  # type: ignore[no-untyped-call]
        run.evaluations, run.iterates = inner.evaluations, inner.iterates
        return outputs, (0, 0, 0, 0, 1, 1)
