"""Forward substitution as a registered operator, so that `torch.compile(fullgraph=True)` takes a layer as a whole.

The operator runs `ForwardSubstitution` as it is; what the compiler learns are its shapes and its gradient. A map is
described to it by numbers and names, since an operator takes tensors and plain values alone.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.map import AttentionMap, QueryMap
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.positions import DistanceSlope, OffsetTable
from implicit_attention.attention.spec import BiasTerm
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Method, Solution

_KINDS = {AdditiveMask: "mask", DistanceSlope: "slope", OffsetTable: "table"}


class _Description(NamedTuple):
    """A causal map and its solver in plain values.

    Attributes:
        names: Of the tensors, with commas.
        kinds: Of the bias terms, with commas.
        scale: Of the scores.
        window: Of the mask, 0 for none.
        dropout: Probability.
        query_heads: Heads of the queries.
        normalize: Whether queries are normed.
        block: Of the solver.
        kernel: Of the solver.
        rtol: Of the solver.
        atol: Of the solver.
        report: Handle of the layer's report.
    """

    names: str
    kinds: str
    scale: float
    window: int
    dropout: float
    query_heads: int
    normalize: bool
    block: int
    kernel: str
    rtol: float
    atol: float
    report: int

    def function(self, tensors: list[Tensor]) -> AttentionMap:
        """The map again."""
        named = dict(zip(self.names.split(","), tensors, strict=True))
        past = named["past_value"].shape[-2] if "past_value" in named else 0
        kinds = self.kinds.split(",") if self.kinds else []
        terms = tuple(_term(kind, named[f"term{i}"], past) for i, kind in enumerate(kinds))
        spec = AttentionSpec(self.scale, True, terms, self.dropout, self.window or None)
        return AttentionMap(spec, QueryMap(self.query_heads, self.normalize), True, tuple(named))

    def solver(self) -> ForwardSubstitution:
        """The solver again."""
        return ForwardSubstitution(block=self.block, kernel=self.kernel, rtol=self.rtol, atol=self.atol or None)


def _term(kind: str, tensor: Tensor, past: int) -> BiasTerm:
    if kind == "mask":
        return AdditiveMask(past)
    return DistanceSlope() if kind == "slope" else OffsetTable((tensor.shape[-1] - 1) // 2)


def serves(solver: Method, adjoint: Adjoint, function: AttentionMap) -> bool:
    """Return whether the operator can stand for a solve: forward substitution, its own adjoint, known bias terms."""
    return (
        isinstance(solver, ForwardSubstitution)
        and isinstance(adjoint, Implicit)
        and adjoint.solver is None
        and all(type(term) in _KINDS for term in function.spec.terms)
    )


def solve(
    solver: ForwardSubstitution, function: AttentionMap, args: tuple[Tensor, ...], dtype: torch.dtype, report: int
) -> Solution:
    """Solve a causal map by the operator.

    Args:
        solver: The solver.
        function: The map, which the operator `serves`.
        args: Its tensors.
        dtype: Of the equilibrium.
        report: Handle of the `FailureReport` that is told how it went.

    Returns:
        The solution, whose value carries the gradient.
    """
    spec, (rtol, atol) = function.spec, solver.tolerances(dtype)
    value, residual, steps, converged, relative, query, lse, inverse = _forward(
        list(args),
        dtype,
        ",".join(function.names),
        ",".join([_KINDS[type(term)] for term in spec.terms]),
        spec.scale,
        spec.window or 0,
        spec.dropout,
        function.query_map.num_heads,
        function.query_map.normalize,
        solver.block,
        solver.kernel,
        rtol,
        atol,
        report,
    )
    return Solution(value, residual, steps, converged, residual[None], relative[None], memo=(query, lse, inverse))


@torch.library.custom_op("implicit_attention::forward_substitution", mutates_args=())
def _forward(
    tensors: list[Tensor],
    dtype: torch.dtype,
    names: str,
    kinds: str,
    scale: float,
    window: int,
    dropout: float,
    query_heads: int,
    normalize: bool,
    block: int,
    kernel: str,
    rtol: float,
    atol: float,
    report: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _Description(names, kinds, scale, window, dropout, query_heads, normalize, block, kernel, rtol, atol, report)
    with torch.autocast(tensors[0].device.type, enabled=False):
        solver = d.solver()
        found = solver.equilibrium(d.function(tensors), tuple(tensors), dtype)
    # What the report keeps is its own: a compiled graph may write over what it no longer needs.
    kept = {name: getattr(found, name).clone() for name in ("residual", "steps", "converged")}
    FailureReport.of(report)(replace(found, **kept), "equilibrium", solver)
    query, lse, inverse = found.memo
    return found.value, found.residual, found.steps, found.converged, found.rel_trace[0].clone(), query, lse, inverse


@_forward.register_fake
def _(
    tensors: list[Tensor], dtype: torch.dtype, names: str, kinds: str, scale: float, window: int, dropout: float,
    query_heads: int, normalize: bool, block: int, kernel: str, rtol: float, atol: float, report: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    named = dict(zip(names.split(","), tensors, strict=True))
    key, groups = named["key"], named["value"].shape[1]
    batch, heads, n, d = key.shape
    wide = torch.promote_types(key.dtype, torch.float32)
    residual = key.new_empty(batch, n, dtype=wide)
    return (
        key.new_empty(batch, n, heads * d, dtype=dtype),
        residual,
        torch.empty_like(residual, dtype=torch.long),
        torch.empty_like(residual, dtype=torch.bool),
        torch.empty_like(residual),
        key.new_empty(batch, n, groups, d),
        key.new_empty(batch, heads, n, dtype=wide),
        key.new_empty((batch, n, groups, 1) if normalize else (0,), dtype=wide),
    )


@torch.library.custom_op("implicit_attention::forward_substitution_adjoint", mutates_args=())
def _adjoint(
    grad: Tensor,
    y: Tensor,
    memo: list[Tensor],
    tensors: list[Tensor],
    needs: list[bool],
    names: str,
    kinds: str,
    scale: float,
    window: int,
    dropout: float,
    query_heads: int,
    normalize: bool,
    block: int,
    kernel: str,
    rtol: float,
    atol: float,
    report: int,
) -> list[Tensor]:
    d = _Description(names, kinds, scale, window, dropout, query_heads, normalize, block, kernel, rtol, 0.0, report)
    with torch.autocast(y.device.type, enabled=False):
        solver = d.solver()
        found = solver.adjoint(d.function(tensors), tuple(tensors), y, tuple(memo), grad, tuple(needs))
    FailureReport.of(report).adjoint(found, grad, solver)
    pairs = zip(found.by_arg, tensors, strict=True)
    return [t.new_zeros(t.shape) if g is None else g.contiguous() for g, t in pairs]


@_adjoint.register_fake
def _(
    grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], names: str, kinds: str,
    scale: float, window: int, dropout: float, query_heads: int, normalize: bool, block: int, kernel: str, rtol: float,
    atol: float, report: int,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in tensors]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    tensors, _, *ctx.plain = inputs  # type: ignore[attr-defined]
    assert isinstance(tensors, list)
    ctx.needs = [t.requires_grad for t in tensors]  # type: ignore[attr-defined]
    ctx.save_for_backward(output[0], *output[5:], *tensors)


def _pull(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[object, ...]:
    y, query, lse, inverse, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    needs, plain = ctx.needs, ctx.plain  # type: ignore[attr-defined]
    found = _adjoint(grad, y, [query, lse, inverse], tensors, needs, *plain)
    return [g if need else None for g, need in zip(found, needs, strict=True)], None, *(None for _ in plain)


_forward.register_autograd(_pull, setup_context=_keep)
