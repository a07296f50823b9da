"""Direct solvers as registered operators, so that `torch.compile(fullgraph=True)` compiles a whole layer.

An operator runs its solver unchanged. The compiler sees its shapes and its gradient only. An operator takes tensors and
plain values alone, so `Described` holds a map and its solver in words and numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from implicit_attention.equilibrium.implicit_function import direct_gradients
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.equilibrium.solvers.base import DirectSolver
from implicit_attention.errors import READS_NUMBERS

Plain = tuple[str, list[float], list[int]]  # words with semicolons, real numbers, integers
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Described(Protocol):
    """A map and its solver in plain values."""

    def arguments(self) -> Plain:
        """Return the description as an operator takes it."""

    def function(self, tensors: list[Tensor]) -> Callable[..., Tensor]:
        """Return the map that is described, for its tensors."""

    def solver(self) -> DirectSolver:
        """Return the solver that is described."""

    def outputs(self, tensors: list[Tensor], dtype: torch.dtype) -> Results:
        """Return empty tensors for the value, residual, steps, converged, relative residual and memo of a solution."""


D = TypeVar("D", bound=Described)


def registered(
    name: str, described: Callable[[str, list[float], list[int]], D]
) -> tuple[Any, Callable[[D, tuple[Tensor, ...], torch.dtype, Tensor], Solution]]:
    """Register an operator, `implicit_attention::{name}`, and that of its gradient.

    Args:
        name: The operator's name.
        described: Makes a description of an operator's plain arguments.

    Returns:
        The operator, and what solves a described map with given tensors in a dtype by it, and tells the report with a
        handle. The solution's value carries the gradient.
    """

    @torch.library.custom_op(f"implicit_attention::{name}", mutates_args=(), tags=READS_NUMBERS)
    def forward(
        tensors: list[Tensor], dtype: torch.dtype, report: Tensor, words: str, numbers: list[float], counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        d = described(words, numbers, counts)
        empty = d.outputs(tensors, dtype)
        if not empty[0].numel():  # an empty batch: nothing to solve
            return empty
        solver = d.solver()
        with torch.autocast(tensors[0].device.type, enabled=False):  # the solver chooses its precision itself
            found = solver.equilibrium(d.function(tensors), tuple(tensors), dtype)
        # What the report keeps is its own: a compiled graph may write over what it no longer needs.
        kept = {name: getattr(found, name).clone() for name in ("residual", "steps", "converged")}
        FailureReport.of(report)(replace(found, **kept), "equilibrium", solver)
        first, second, third = (t.contiguous() for t in found.memo)
        # The trace is cloned: an operator must not return views of its other results.
        return (
            found.value.contiguous(), found.residual, found.steps, found.converged, found.rel_trace[0].clone(),
            first, second, third,
        )  # fmt: skip

    @forward.register_fake
    def _(
        tensors: list[Tensor], dtype: torch.dtype, report: Tensor, words: str, numbers: list[float], counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return described(words, numbers, counts).outputs(tensors, dtype)

    @torch.library.custom_op(f"implicit_attention::{name}_adjoint", mutates_args=(), tags=READS_NUMBERS)
    def adjoint(
        grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], report: Tensor,
        words: str, numbers: list[float], counts: list[int],
    ) -> list[Tensor]:  # fmt: skip
        if not y.numel():
            return [t.new_zeros(t.shape) for t in tensors]
        d = described(words, numbers, counts)
        solver = replace(d.solver(), atol=None)  # cotangents have no scale of their own
        found = direct_gradients(
            solver, d.function(tensors), tuple(tensors), y, tuple(memo), grad, tuple(needs), FailureReport.of(report)
        )
        pairs = zip(found, tensors, strict=True)
        return [t.new_zeros(t.shape) if g is None else g.contiguous() for g, t in pairs]

    @adjoint.register_fake
    def _(
        grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], report: Tensor,
        words: str, numbers: list[float], counts: list[int],
    ) -> list[Tensor]:  # fmt: skip
        return [t.new_empty(t.shape) for t in tensors]

    adjoint.register_autograd(partial(_refuse, name))

    def keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Results) -> None:
        tensors, _, report, *ctx.plain = inputs  # type: ignore[attr-defined]
        assert isinstance(tensors, list)
        assert isinstance(report, Tensor)
        ctx.needs = [t.requires_grad for t in tensors]  # type: ignore[attr-defined]
        ctx.save_for_backward(output[0], *output[5:], report, *tensors)

    def pull(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[object, ...]:
        y, first, second, third, report, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        needs, plain = ctx.needs, ctx.plain  # type: ignore[attr-defined]
        found = adjoint(grad, y, [first, second, third], tensors, needs, report, *plain)
        return [g if need else None for g, need in zip(found, needs, strict=True)], None, None, *(None for _ in plain)

    forward.register_autograd(pull, setup_context=keep)

    def solve(d: D, args: tuple[Tensor, ...], dtype: torch.dtype, report: Tensor) -> Solution:
        value, residual, steps, converged, relative, *memo = forward(list(args), dtype, report, *d.arguments())
        return Solution(value, residual, steps, converged, residual[None], relative[None], memo=tuple(memo))

    return forward, solve


def _refuse(name: str, *_: object) -> None:
    raise NotImplementedError(
        f"the gradient of implicit_attention::{name}, the operator of an exported layer, has no gradient of its own. "
        "Take second derivatives of the layer itself, before torch.export."
    )
