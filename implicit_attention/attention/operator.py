"""The solver of contractions as a registered operator, so that `torch.compile(fullgraph=True)` compiles a whole layer.

The operator runs `Contraction` unchanged; the compiler sees its shapes and its gradient only. An operator takes tensors
and plain values alone, so a map and its solver are described in words and numbers.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention.contraction import Contraction
from implicit_attention.attention.map import AttentionMap, QueryMap
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.positions import DistanceSlope, OffsetTable
from implicit_attention.attention.spec import AttentionSpec, BiasTerm
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Method, Solution

KINDS: dict[type, str] = {AdditiveMask: "mask", DistanceSlope: "slope", OffsetTable: "table"}


def make_term(kind: str, tensor: Tensor, past: int = 0) -> BiasTerm:
    """Return the bias term of a kind.

    Args:
        kind: One of `KINDS`.
        tensor: Its tensor.
        past: Number of columns before the first row's own.
    """
    if kind == "mask":
        return AdditiveMask(past)
    return DistanceSlope() if kind == "slope" else OffsetTable((tensor.shape[-1] - 1) // 2)


class _Description(NamedTuple):
    """A map without a causal mask and its solver in plain values.

    Attributes:
        names: Names of the tensors, with commas.
        kinds: Kinds of the bias terms, with commas.
        scale: Factor on the scores.
        dropout: Probability.
        max_gain: The rate.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        query_heads: Heads of the queries.
        by_keys: Whether rows belong to keys, 0 or 1.
        steps: Steps of the solver, 0 to stop at the tolerance.
        report: Handle of the layer's report.
    """

    names: str
    kinds: str
    scale: float
    dropout: float
    max_gain: float
    rtol: float
    atol: float
    query_heads: int
    by_keys: int
    steps: int
    report: int

    @classmethod
    def of(cls, words: str, numbers: list[float], counts: list[int]) -> "_Description":
        """The description in an operator's arguments."""
        return cls._make([*words.split(";"), *numbers, *counts])

    def arguments(self) -> tuple[str, list[float], list[int]]:
        """The same as an operator takes it: words, real numbers and integers."""
        return ";".join(self[:2]), list(self[2:7]), list(self[7:])

    def function(self, tensors: list[Tensor]) -> AttentionMap:
        """The map that is described, for its tensors."""
        named = dict(zip(self.names.split(","), tensors, strict=True))
        kinds = self.kinds.split(",") if self.kinds else []
        terms = tuple(make_term(kind, named[f"term{i}"]) for i, kind in enumerate(kinds))
        spec = AttentionSpec(self.scale, terms=terms, dropout=self.dropout)
        query_map, by_keys = QueryMap(self.query_heads), bool(self.by_keys)
        return AttentionMap(spec, query_map, by_keys, tuple(named), max_gain=self.max_gain)

    def solver(self) -> Contraction:
        """The solver that is described."""
        return Contraction(rtol=self.rtol, atol=self.atol or None, steps=self.steps or None)


def serves(solver: Method, adjoint: Adjoint, function: AttentionMap) -> bool:
    """Return whether the operator can replace a solve: this solver, its own adjoint, known bias terms."""
    return (
        isinstance(solver, Contraction)
        and isinstance(adjoint, Implicit)
        and adjoint.solver is None
        and function.max_gain is not None
        and all(type(term) in KINDS for term in function.spec.terms)
    )


def solve(
    solver: Contraction, function: AttentionMap, args: tuple[Tensor, ...], dtype: torch.dtype, report: int
) -> Solution:
    """Solve a map by the operator.

    Args:
        solver: The solver.
        function: The map, for which `serves` is true.
        args: Its tensors.
        dtype: Of the equilibrium.
        report: Handle of the layer's `FailureReport`.

    Returns:
        The solution, whose value carries the gradient.
    """
    assert function.max_gain is not None
    rtol, atol = solver.tolerances(dtype)
    kinds = ",".join([KINDS[type(term)] for term in function.spec.terms])
    described = _Description(
        ",".join(function.names), kinds, function.spec.scale, function.spec.dropout, function.max_gain, rtol, atol,
        function.query_map.num_heads, int(function.rows_are_keys), solver.steps or 0, report,
    )  # fmt: skip
    value, residual, steps, converged, relative, *memo = _forward(list(args), dtype, *described.arguments())
    return Solution(value, residual, steps, converged, residual[None], relative[None], memo=tuple(memo))


@torch.library.custom_op("implicit_attention::contraction", mutates_args=())
def _forward(
    tensors: list[Tensor], dtype: torch.dtype, words: str, numbers: list[float], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _Description.of(words, numbers, counts)
    if not tensors[d.names.split(",").index("gate")].numel():  # an empty batch: nothing to solve
        return _outputs(tensors, dtype, words, numbers, counts)  # type: ignore[no-any-return]
    solver = d.solver()
    with torch.autocast(tensors[0].device.type, enabled=False):
        found = solver.equilibrium(d.function(tensors), tuple(tensors), dtype)
    # What the report keeps is its own: a compiled graph may write over what it no longer needs.
    kept = {name: getattr(found, name).clone() for name in ("residual", "steps", "converged")}
    FailureReport.of(d.report)(replace(found, **kept), "equilibrium", solver)
    at, query, lse = found.memo
    # An operator returns no views of its other results, and all in the layout that the compiler expects.
    return (
        found.value.contiguous(), found.residual, found.steps, found.converged, found.rel_trace[0].clone(),
        at.contiguous(), query.contiguous(), lse.contiguous(),
    )  # fmt: skip


@_forward.register_fake
def _outputs(
    tensors: list[Tensor], dtype: torch.dtype, words: str, numbers: list[float], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _Description.of(words, numbers, counts)
    named = dict(zip(d.names.split(","), tensors, strict=True))
    key, size, dim = named["key"], named["weight"].shape[1], named["key"].shape[-1]
    batch, n = len(key), key.shape[-2] if d.by_keys else named["added"].shape[1]
    wide = torch.promote_types(key.dtype, torch.float32)
    residual = key.new_empty((batch,) if d.by_keys else (batch, n), dtype=wide)
    return (
        key.new_empty(batch, n, size, dtype=dtype),
        residual,
        torch.empty_like(residual, dtype=torch.long),
        torch.empty_like(residual, dtype=torch.bool),
        torch.empty_like(residual),
        key.new_empty(batch, n, size),
        key.new_empty(batch, d.query_heads, n, dim),
        key.new_empty(batch, size // dim, n, dtype=wide),
    )


@torch.library.custom_op("implicit_attention::contraction_adjoint", mutates_args=())
def _adjoint(
    grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], words: str,
    numbers: list[float], counts: list[int],
) -> list[Tensor]:  # fmt: skip
    d = _Description.of(words, numbers, counts)
    if not y.numel():
        return [t.new_zeros(t.shape) for t in tensors]
    solver = d.solver()
    with torch.autocast(y.device.type, enabled=False):
        found = solver.adjoint(d.function(tensors), tuple(tensors), y, tuple(memo), grad, tuple(needs))
    FailureReport.of(d.report).adjoint(found, grad, solver)
    pairs = zip(found.by_arg, tensors, strict=True)
    return [t.new_zeros(t.shape) if g is None else g.contiguous() for g, t in pairs]


@_adjoint.register_fake
def _(
    grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], words: str,
    numbers: list[float], counts: list[int],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in tensors]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    tensors, _, *ctx.plain = inputs  # type: ignore[attr-defined]
    assert isinstance(tensors, list)
    ctx.needs = [t.requires_grad for t in tensors]  # type: ignore[attr-defined]
    ctx.save_for_backward(output[0], *output[5:], *tensors)


def _pull(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[object, ...]:
    y, at, query, lse, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    needs, plain = ctx.needs, ctx.plain  # type: ignore[attr-defined]
    found = _adjoint(grad, y, [at, query, lse], tensors, needs, *plain)
    return [g if need else None for g, need in zip(found, needs, strict=True)], None, *(None for _ in plain)


_forward.register_autograd(_pull, setup_context=_keep)
