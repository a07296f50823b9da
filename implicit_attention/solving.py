"""How a layer's equation is solved: by which solver, with which gradient, and what is known of the solution."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_attention.attention.map import AttentionMap
from implicit_attention.attention.positions import Positions
from implicit_attention.causal import operator
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.decoding import Decoded, decode, serves
from implicit_attention.equation import Equation, Layer, prepare, project
from implicit_attention.equation.packing import PackedMap, outside_graphs
from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit, Phantom, Problem, Unrolled
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Anderson, DirectSolver, Method, Solution
from implicit_attention.errors import CollapseWarning, NonFiniteError, bad_type, bad_value
from implicit_attention.inputs import Inputs, non_finite
from implicit_attention.settings import Settings

ALIKE = 3e-2  # difference of outputs, in units of that of the values, below which they are the same vector


class SolvedLayer(Layer, Protocol):
    """What a call of a layer is solved with, under the names of `ImplicitQueryAttention`."""

    adjoint: Adjoint

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name, for a message that says which is to blame."""


_ADJOINTS = {"implicit": Implicit, "unrolled": Unrolled, "phantom": Phantom}


def make_solver(solver: str | Method, settings: Settings, adjoint: Adjoint) -> Method:
    """Return the solver that a layer's `solver` argument names.

    Args:
        solver: "auto" or a solver.
        settings: Of the layer.
        adjoint: Its gradient: what is unrolled needs an iterative solver.

    Returns:
        The solver.

    Raises:
        TypeError: If it is neither a name nor a solver.
        ValueError: If it cannot solve the layer's equations.
    """
    if isinstance(solver, DirectSolver) and not settings.triangular:
        raise bad_value(
            "solver", 'an iterative one unless is_causal=True and normalize_over="queries"', solver,
            'Rows depend on later rows here, or on no other: use "auto" or Anderson().',
        )  # fmt: skip
    if isinstance(solver, Method):
        return solver
    if not isinstance(solver, str):
        raise bad_type("solver", '"auto" or a solver object such as Picard()', solver)
    if solver != "auto":
        raise bad_value("solver", '"auto" or a solver object such as Picard()', solver)
    return ForwardSubstitution() if settings.triangular and not isinstance(adjoint, Unrolled) else Anderson()


def make_adjoint(adjoint: str | Adjoint) -> Adjoint:
    """Return the gradient that a layer's `adjoint` argument names.

    Args:
        adjoint: "implicit", "unrolled", "phantom", or a gradient.

    Returns:
        The gradient.

    Raises:
        TypeError: If it is neither a name nor a gradient.
        ValueError: If the name is unknown.
    """
    if isinstance(adjoint, Adjoint):
        return adjoint
    if isinstance(adjoint, str) and adjoint in _ADJOINTS:
        made: Adjoint = _ADJOINTS[adjoint]()
        return made
    if not isinstance(adjoint, str):
        raise bad_type("adjoint", '"implicit", "unrolled", "phantom" or an object such as Implicit()', adjoint)
    raise bad_value("adjoint", '"implicit", "unrolled", "phantom" or an object such as Implicit()', adjoint)


def solve(
    equation: Equation, solver: Method, adjoint: Adjoint, report: FailureReport, *, history: bool = False
) -> Solution:
    """Return the solution of an equation, through whose value gradients flow.

    Args:
        equation: The equation.
        solver: What solves it.
        adjoint: What differentiates it.
        report: Is told how it went.
        history: Keep every iterate.

    Returns:
        The solution.

    Raises:
        NonFiniteError: If the map gives NaN or Inf.
        ConvergenceError: If the tolerance is missed and the report raises.
    """
    function, args, start = equation
    if isinstance(function, PackedMap):
        parts = _batches(function, args, start)
        solutions = [solve(part, solver, adjoint, report, history=history) for part in parts]
        packed = function.packing.pack_solutions(solutions)
        report.keep(packed)
        return packed
    if torch.compiler.is_compiling() and not history and operator.serves(solver, adjoint, function):
        assert isinstance(solver, ForwardSubstitution)
        return operator.solve(solver, function, args, start.dtype, report.handle)
    problem = Problem(function, solver, function.system_ndim, function.row_ndim, report)
    return adjoint(problem, start, args, history=history)


def _batches(function: PackedMap, args: tuple[Tensor, ...], start: Tensor) -> list[Equation]:
    """The equations of packed documents, batch by batch."""
    parts = zip(function.maps, function.by_batch(args), function.packing.unpack(start), strict=True)
    return [Equation(*part) for part in parts]


def columns(equation: Equation, solution: Solution) -> tuple[Tensor, Tensor]:
    """Return what a cache keeps of the tokens of a solved equation, differentiable where the solution is.

    Args:
        equation: The equation.
        solution: Its solution.

    Returns:
        Their side of the scores and their values, `[B, G, N, d]` each.
    """
    function, args = equation.function, equation.args
    assert isinstance(function, AttentionMap)  # `inputs` refuses a cache of packed documents
    known = solution.memo and not (torch.is_grad_enabled() and solution.value.requires_grad)  # it has no graph
    column = solution.memo[0].transpose(1, 2) if known else function.columns(solution.value, *args)
    return column, args[function.names.index("value")]


def row_gains(equation: Equation, solution: Solution) -> Tensor:
    """Return the spectral radius of each row's own Jacobian at the equilibrium of a causal equation, `[B, N]`.

    Args:
        equation: The equation.
        solution: Its solution, by any solver.
    """
    function, memo = equation.function, solution.memo
    with torch.no_grad():
        if not isinstance(function, PackedMap):
            return ForwardSubstitution().gains(function, equation.args, solution.value, memo)
        parts, each = _batches(function, equation.args, solution.value), len(memo) // len(function.maps)
        memos = [memo[i * each : (i + 1) * each] for i in range(len(parts))]
        found = [ForwardSubstitution().gains(*part, own) for part, own in zip(parts, memos, strict=True)]
        return function.packing.pack(found)


class Found(NamedTuple):
    """A solved call; the cache has not been given its tokens."""

    solution: Solution
    equation: Equation | None
    decoded: Decoded | None

    def weights(self) -> Tensor:
        """Return the attention matrix, `[B, H, N, M]`."""
        assert self.equation is not None
        return self.equation.function.weights(self.solution.value, *self.equation.args)

    def with_gains(self) -> Solution:
        """Return the solution, and in it how much each row feeds itself."""
        assert self.equation is not None
        return replace(self.solution, gain=row_gains(self.equation, self.solution))

    def give(self, inputs: Inputs) -> None:
        """Give the cache the new tokens: the last thing a call does, so that one that raises leaves it as it was."""
        if inputs.cache is not None and self.decoded is not None:
            self.decoded.give(inputs.cache)
        elif inputs.cache is not None and self.equation is not None:
            inputs.cache.append(*columns(self.equation, self.solution), inputs.key_padding_mask)


def settle(
    layer: SolvedLayer, report: FailureReport, inputs: Inputs, *, history: bool = False, short: bool = False
) -> Found:
    """Solve the equation of a call.

    Args:
        layer: The layer.
        report: Is told how it went.
        inputs: Of the call, checked.
        history: Keep every iterate.
        short: Whether the short way of one new token will do, which makes no equation.

    Returns:
        What was found.

    Raises:
        ValueError: If the map gives NaN or Inf; the message names the input or parameter to blame.
        ConvergenceError: If the tolerance is missed and the report raises.
    """
    if inputs.packed and torch.compiler.is_compiling():
        return outside_graphs(settle)(layer, report, inputs, history=history)
    projected = project(layer, inputs)
    decoded = decode(layer, inputs, projected) if short and serves(layer, inputs) else None
    if decoded is not None:
        report.keep(decoded.solution)
        return Found(decoded.solution, None, decoded)
    equation = prepare(layer, inputs, projected)
    try:
        solution = solve(equation, layer.solver, layer.adjoint, report, history=history)
    except NonFiniteError as error:
        raise non_finite({**inputs.named(), **dict(layer.named_parameters())}) from error
    _watch(layer, inputs, equation, solution.value, report)
    return Found(solution, equation, None)


def _watch(layer: SolvedLayer, inputs: Inputs, equation: Equation, value: Tensor, report: FailureReport) -> None:
    """Watch for collapse; packed documents each for itself."""
    function = equation.function
    if not isinstance(function, PackedMap):
        watch_for_collapse(layer.settings, layer.positions, inputs, equation.start, value, report)
        return
    starts, values = function.packing.unpack(equation.start), function.packing.unpack(value)
    for own, start, found in zip(function.packing.unpack_inputs(inputs), starts, values, strict=True):
        watch_for_collapse(layer.settings, layer.positions, own, start, found, report)


def watch_for_collapse(
    settings: Settings, positions: Positions | None, inputs: Inputs, start: Tensor, value: Tensor, report: FailureReport
) -> None:
    """Warn once of a layer all of whose outputs are the same vector though its values differ.

    That is an equilibrium of every layer without a causal mask whose queries see nothing but outputs: if all outputs
    agree, so do all queries. With the softmax over queries the weights are then uniform, and `Omega_Q` and `W_K` get no
    gradient. Layers with a mask, positions or `query_input=True` are not watched.

    Args:
        settings: Of the layer.
        positions: Of the layer.
        inputs: Of the call.
        start: The values of its tokens, `[B, N, D]`.
        value: Its equilibrium, `[B, N, D]`.
        report: Says it.
    """
    able = not (settings.is_causal or settings.query_input or positions is not None or inputs.attn_mask is not None)
    if not able or start.shape[1] == 1 or not start.numel() or maps.transforms_active():
        return
    padding, sentence = inputs.key_padding_mask if inputs.context is None else None, _COLLAPSED[settings.rows_are_keys]
    look: Callable[..., None] = _look
    if torch.compiler.is_compiling():  # these solves are no part of a compiled graph either
        look = torch.compiler.disable(_look)  # type: ignore[no-untyped-call]
    look(start, value, padding, sentence, report)


def _look(start: Tensor, value: Tensor, padding: Tensor | None, sentence: str, report: FailureReport) -> None:
    if not report.said(CollapseWarning) and collapsed(start, value, padding):
        report.once(sentence, CollapseWarning)


_COLLAPSED = {
    True: "every output is the mean of the values, so all weights are uniform, and Omega_Q and W_K get no gradient. "
    'Make the layer with query_input=True, is_causal=True or positions="rope".',
    False: "every token gets the same output, because all rows pose the same equation. Make the layer with "
    "query_input=True.",
}


@torch.no_grad()
def collapsed(start: Tensor, value: Tensor, padding: Tensor | None) -> bool:
    """Return whether the outputs of every sample are one vector, though what they started from differs.

    Args:
        start: The values of all tokens, `[B, N, D]`.
        value: The outputs, `[B, N, D]`.
        padding: `[B, N]`: hidden tokens, whose values do not count.
    """
    few = value[:, [0, value.shape[1] // 2, -1]]  # in a layer at work they differ, and nothing else is looked at
    if not value.numel() or not _differ(few, start).logical_not().all():
        return False
    if padding is not None:
        if padding.dtype != torch.bool:
            return False
        seen = start.gather(1, padding.long().argmin(1)[:, None, None].expand(-1, 1, start.shape[2]))
        start = torch.where(padding[..., None], seen, start)  # hidden tokens repeat the first that is not
    spread = (start.amax(1) - start.amin(1)).amax(1)
    telling = spread > ALIKE * start.abs().amax((1, 2))  # beyond rounding: equal values give equal outputs rightly
    return bool((telling & ~_differ(value, start)).any() and not (telling & _differ(value, start)).any())


def _differ(value: Tensor, start: Tensor) -> Tensor:
    """Whether outputs of a sample differ, `[B]`."""
    return (value.amax(1) - value.amin(1)).amax(1) > ALIKE * (start.amax(1) - start.amin(1)).amax(1)
