"""How a layer's equation is solved: by which solver, with which gradient, and what is known of the solution."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_attention.attention import operator as contraction_operator
from implicit_attention.attention.contraction import Contraction
from implicit_attention.attention.map import AttentionMap
from implicit_attention.causal import operator as causal_operator
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.decoding import Decoded, decode, serves
from implicit_attention.equation import Equation, prepare
from implicit_attention.equation.collapse import watch, watch_masks
from implicit_attention.equation.packing import IN_A_GRAPH, READS, PackedMap
from implicit_attention.equation.projection import Layer, project
from implicit_attention.equilibrium import maps
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit, Phantom, Unrolled
from implicit_attention.equilibrium.outside_graphs import outside_graphs
from implicit_attention.equilibrium.problem import Problem
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Anderson, DirectSolver, Method, Solution
from implicit_attention.equilibrium.solvers.solution import writable
from implicit_attention.errors import Came, NonFiniteError, all_finite, bad_type, bad_value, required
from implicit_attention.inputs import Inputs, non_finite
from implicit_attention.settings import Settings


class SolvedLayer(Layer, Protocol):
    """What a call of a layer is solved with, under the names of `ImplicitQueryAttention`."""

    adjoint: Adjoint
    out_proj: nn.Linear | None

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name, for a message that says which is to blame."""


_SOLVERS = ("Picard", "Anderson", "Broyden", "NewtonKrylov", "ForwardSubstitution", "Contraction")
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
    if isinstance(solver, Contraction) and settings.max_gain is None:
        raise bad_value("solver", "another one with max_gain=None", Came("Contraction(...)"),
                        "Only maps with max_gain contract by a known rate: give the layer max_gain=0.9, or take "
                        "Anderson().")  # fmt: skip
    if isinstance(solver, DirectSolver) and not (settings.triangular or isinstance(solver, Contraction)):
        raise bad_value(
            "solver", 'an iterative one unless is_causal=True and normalize_over="queries"', solver,
            'Rows depend on later rows here, or on no other: use "auto" or Anderson().',
        )  # fmt: skip
    if isinstance(solver, Method):
        if isinstance(adjoint, Unrolled):
            adjoint.check(solver)
        return solver
    if not isinstance(solver, str):
        raise bad_type("solver", '"auto" or a solver object such as Picard()', solver)
    if solver != "auto":
        called = next((name for name in _SOLVERS if name.lower() == solver.replace("_", "").lower()), None)
        remedy = "" if called is None else f"Write solver={called}()."
        raise bad_value("solver", '"auto" or a solver object such as Picard()', solver, remedy)
    if isinstance(adjoint, Unrolled):
        return Anderson()
    return ForwardSubstitution() if settings.triangular else Anderson() if settings.max_gain is None else Contraction()


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
        named: Adjoint = _ADJOINTS[adjoint]()
        return named
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
        parts = _by_batch(function, args, start)
        solutions = [solve(part, solver, adjoint, report, history=history) for part in parts]
        packed = function.packing.pack_solutions(solutions)
        report.keep(packed)
        return packed
    if torch.compiler.is_compiling() and not history:
        given = (function, args, start.dtype, report.handle)
        if isinstance(solver, ForwardSubstitution) and causal_operator.serves(solver, adjoint, function):
            return causal_operator.solve(solver, *given)
        if isinstance(solver, Contraction) and contraction_operator.serves(solver, adjoint, function):
            return contraction_operator.solve(solver, *given)
    problem = Problem(function, solver, function.system_ndim, function.row_ndim, report)
    return adjoint(problem, start, args, history=history)


def _by_batch(function: PackedMap, args: tuple[Tensor, ...], start: Tensor) -> list[Equation]:
    """The equations of packed documents, batch by batch."""
    parts = zip(function.maps, function.by_batch(args), function.packing.unpack(start), strict=True)
    return [Equation(*part) for part in parts]


def _cache_columns(equation: Equation, solution: Solution) -> tuple[Tensor, Tensor]:
    """What a cache keeps of the tokens of a solved equation, differentiable where the solution is.

    Returns:
        Their column side of the scores and their values, `[B, G, N, d]` each.
    """
    function, args = equation.function, equation.args
    assert isinstance(function, AttentionMap)  # `inputs` refuses a cache of packed documents
    known = solution.memo and not (torch.is_grad_enabled() and solution.value.requires_grad)  # it has no graph
    column = solution.memo[0].transpose(1, 2) if known else function.columns(solution.value, *args)
    return column, function.column_values(solution.value, *args)


def row_gains(equation: Equation, solution: Solution) -> Tensor:
    """Return the spectral radius of each row's own Jacobian at the equilibrium of a causal equation, `[B, N]`.

    Args:
        equation: The equation.
        solution: Its solution, by any solver.
    """
    function, memo = equation.function, solution.memo
    with torch.no_grad(), torch.autocast(solution.value.device.type, enabled=False):  # in float32 or wider
        if not isinstance(function, PackedMap):
            return ForwardSubstitution().gains(function, equation.args, solution.value, memo)
        parts, each = _by_batch(function, equation.args, solution.value), len(memo) // len(function.maps)
        memos = [memo[i * each : (i + 1) * each] for i in range(len(parts))]
        gains = [ForwardSubstitution().gains(*part, m) for part, m in zip(parts, memos, strict=True)]
        return function.packing.pack(gains)


_MAY_NOT_CONTRACT = (
    " Without a causal mask a map may stop contracting as weights grow: a layer with {} has one equilibrium for any "
    "weights."
)


class SolvedCall(NamedTuple):
    """A solved call, before its tokens are added to the cache.

    Attributes:
        solution: The solution.
        equation: What it solves; None if the token was decoded.
        decoded: The token, if it was decoded.
        output: What `forward` returns of the solution, if needed.
    """

    solution: Solution
    equation: Equation | None
    decoded: Decoded | None
    output: Tensor | None = None

    def weights(self, average: bool) -> Tensor:
        """Return the attention matrix, `[B, H, N, M]`, or its average over the heads, `[B, N, M]`."""
        assert self.equation is not None
        weights = self.equation.function.weights(self.solution.value, *self.equation.args)
        return weights.mean(1) if average else weights

    def with_gains(self, report: FailureReport) -> Solution:
        """Return the solution, and in it how much each row feeds itself; the report keeps that too."""
        assert self.equation is not None
        gain = row_gains(self.equation, self.solution)
        report.keep_gain(gain)
        return replace(self.solution, gain=gain)

    def fill_cache(self, inputs: Inputs) -> None:
        """Add the new tokens to the cache: the last thing a call does, so that one that raises leaves it as it was."""
        if inputs.cache is not None and self.decoded is not None:
            self.decoded.fill_cache(inputs.cache)
        elif inputs.cache is not None and self.equation is not None:
            inputs.cache.append(*_cache_columns(self.equation, self.solution), inputs.key_padding_mask)


def solve_call(
    layer: SolvedLayer,
    report: FailureReport,
    inputs: Inputs,
    *,
    history: bool = False,
    may_decode: bool = False,
    needs_output: bool = False,
) -> SolvedCall:
    """Solve the equation of a call.

    Args:
        layer: The layer.
        report: Is told how it went.
        inputs: Of the call, checked.
        history: Keep every iterate.
        may_decode: Whether `decoding` may solve one new token after a cache. It makes no equation.
        needs_output: Whether to compute the layer's output, too.

    Returns:
        The solution, and what it was made from.

    Raises:
        ValueError: If the map or the output holds NaN or Inf; the message names the input or parameter to blame. Or
            if packed documents are exported.
        ConvergenceError: If the tolerance is missed and the report raises.
    """
    if inputs.packed and torch.compiler.is_compiling():
        solved = outside_graphs(_solve_call, READS, IN_A_GRAPH)(layer, report, inputs, history, False)
    else:
        solved = _solve_call(layer, report, inputs, history, may_decode)
    return solved._replace(output=_output(layer, inputs, solved.solution.value)) if needs_output else solved


def _solve_call(
    layer: SolvedLayer, report: FailureReport, inputs: Inputs, history: bool, may_decode: bool
) -> SolvedCall:
    if inputs.start is not None and isinstance(layer.solver, ForwardSubstitution):
        raise bad_value("start", "None with ForwardSubstitution, which solves row by row", inputs.start,
                        "Leave it out, or give the layer an iterative solver such as Anderson().")  # fmt: skip
    projected = project(layer, inputs) if may_decode and serves(layer, inputs) else None
    decoded = None if projected is None else decode(layer, inputs, projected)
    if decoded is not None:
        report.keep(decoded.solution)
        return SolvedCall(replace(decoded.solution, unique=layer.settings.unique), None, decoded)
    equation = prepare(layer, inputs, projected)
    if not torch.compiler.is_compiling():
        contracts = layer.settings.is_causal or layer.settings.unique
        report.advice = "" if contracts else _MAY_NOT_CONTRACT.format(layer.settings.contracting)
    try:
        solution = solve(equation, layer.solver, layer.adjoint, report, history=history)
    except NonFiniteError as error:
        raise non_finite({**inputs.named(), **dict(layer.named_parameters())}) from error
    watch_masks(layer.settings, inputs, report)
    if not layer.settings.is_causal:
        watch(layer, inputs, equation, solution.value, report)
    return SolvedCall(replace(solution, unique=layer.settings.unique), equation, None)


def _output(layer: SolvedLayer, inputs: Inputs, y: Tensor) -> Tensor:
    """What a layer returns of an equilibrium: projected, if it has an `out_proj`."""
    if layer.out_proj is None:
        return writable(y)
    out: Tensor = layer.out_proj(y)
    overflow = "The output of `out_proj` overflows: scale it down, or use a wider dtype."
    if torch.compiler.is_compiling():
        return required(out, torch.isfinite(out).all(), overflow)
    if not maps.transforms_active() and not all_finite(out):
        raise non_finite({**inputs.named(), **dict(layer.named_parameters())}, overflow)
    return out
