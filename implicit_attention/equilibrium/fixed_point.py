"""`fixed_point`: solve any map and differentiate the result."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.problem import Problem
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Anderson, Solution, Solver
from implicit_attention.equilibrium.solvers.solution import writable
from implicit_attention.errors import Came, bad_type, bad_value, check_positive, describe

__all__ = ["FailureReport", "fixed_point"]


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

    A module is called as often as `Solution.evaluations` says. So `nn.BatchNorm*` in training mode updates its running
    statistics at every evaluation, those far from the equilibrium too, makes systems depend on each other, and cannot
    be differentiated by `NewtonKrylov`. Put it in eval mode, or use `nn.LayerNorm` or `nn.GroupNorm`. `nn.Dropout` in
    training mode draws anew at every evaluation, and no equilibrium exists.

    Under autocast, the backward pass evaluates the map under the autocast of this call, wherever it runs.

    Args:
        function: A pure function `(y, *args) -> tensor like y`, or an `nn.Module` with that signature. The module's
            parameters receive gradients too. No system's result may depend on another system. It leaves y as it is.
        y0: Start, `[*systems, ...]`, float.
        args: Tensors that the map depends on, real or complex.
        solver: A solver; `Anderson()` if None.
        adjoint: `Implicit()` if None, `Unrolled()` or `Phantom()`.
        system_ndim: Number of leading dimensions of y0 that count independent systems. Each system stops for itself.
        on_failure: "warn", "raise" or "ignore" if the residual stays above tolerance.
        history: Whether to keep every iterate in `Solution.history`.

    Returns:
        The solution; its `value` carries the gradient, and may be changed in place.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If y0 has too few dimensions, the map changes y in place, its result is not like y0, or it returns
            NaN or Inf.
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
    if not isinstance(args, tuple | list):
        raise bad_type("args", "a tuple of tensors", args, "Write (a,) for one tensor, () for none.")
    call, lifted = maps.lift(function, tuple(args))
    call = maps.with_autocast(_checked(call, len(args)), y0.device.type)
    problem = Problem(call, solver, system_ndim, system_ndim, FailureReport(on_failure))
    solution = adjoint(problem, y0, lifted, history=history)
    return replace(solution, value=writable(solution.value))


def _checked(function: maps.MapFunction, given: int) -> maps.MapFunction:
    """The same map, which refuses to change y or the `given` first arguments, and results that are not like y."""
    first = True

    def call(y: Tensor, *args: Tensor) -> Tensor:
        nonlocal first
        watched = (y, *args[:given])
        before = [_state(tensor, first) for tensor in watched]
        try:
            out = function(y, *args)
        except RuntimeError as error:
            if "leaf Variable that requires grad" in str(error):  # torch's word for an in-place change of y or args
                raise _changes_in_place("y or args") from error
            error.add_note(f"`function` was called with {_inputs_in_words(y, args)}.")
            raise
        for i, (tensor, state) in enumerate(zip(watched, before, strict=True)):
            if _changed(tensor, state):
                raise _changes_in_place(f"args[{i - 1}]" if i else "y")
        if not isinstance(out, Tensor) or out.shape != y.shape:
            raise bad_value("function", f"a map that returns a tensor of shape {tuple(y.shape)}, like y", out)
        first = False
        return out

    return call


def _state(tensor: Tensor, first: bool) -> int | Tensor | None:
    # Torch counts changes, but not in inference mode. There a copy tells; only the first call makes one.
    if maps.transforms_active():
        return None
    if not torch.is_inference(tensor):
        return tensor._version
    return tensor.clone() if first else None


def _changed(tensor: Tensor, before: int | Tensor | None) -> bool:
    if isinstance(before, Tensor):
        both_nan = (tensor != tensor) & (before != before)
        return bool(((tensor != before) & ~both_nan).any())
    return before is not None and tensor._version != before


def _changes_in_place(what: str) -> ValueError:
    return bad_value("function", f"a map that leaves {what} as it is", Came("one that changes it in place"),
                     "Write y * 0.5 instead of y.mul_(0.5).")  # fmt: skip


_NAMED = 4  # arguments that a message describes: a module has many parameters


def _inputs_in_words(y: Tensor, args: tuple[Tensor, ...]) -> str:
    """The inputs of a map; a module's parameters follow its arguments."""
    words = [f"y: {describe(y)}", *(f"args[{i}]: {describe(a)}" for i, a in enumerate(args[:_NAMED]))]
    return "; ".join(words) + ("; ..." if len(args) > _NAMED else "")
