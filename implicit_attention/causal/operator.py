"""Forward substitution as a registered operator, so that `torch.compile(fullgraph=True)` compiles a whole layer.

The operator runs `ForwardSubstitution` unchanged. The compiler sees its shapes and its gradient only. An operator takes
tensors and plain values alone, so `_Description` holds a map and its solver in words and numbers.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.map import AttentionMap, QueryMap, ValueMap
from implicit_attention.attention.operator import KINDS, make_term
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.equilibrium.solvers import Method, Solution


class _Description(NamedTuple):
    """A causal map and its solver in plain values.

    Attributes:
        names: Names of the tensors, with commas.
        kinds: Kinds of the bias terms, with commas.
        kernel: Engine of the solver.
        scale: Factor on the scores.
        dropout: Probability.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver, 0 for its default.
        window: Window of the mask, 0 for none.
        query_heads: Heads of the queries.
        normalize: Whether queries are normed, 0 or 1.
        reads_output: Whether queries read outputs, 0 or 1.
        feedback: 0 if values read no outputs, 1 if they do, 2 if they read normed ones.
        block: Rows of the solver's diagonal blocks.
        report: Handle of the layer's report.
    """

    names: str
    kinds: str
    kernel: str
    scale: float
    dropout: float
    rtol: float
    atol: float
    window: int
    query_heads: int
    normalize: int
    reads_output: int
    feedback: int
    block: int
    report: int

    @classmethod
    def of_map(
        cls, solver: ForwardSubstitution, function: AttentionMap, rtol: float, atol: float, report: int
    ) -> "_Description":
        """The description of a map and its solver, with the tolerances and the report's handle."""
        spec, query_map = function.spec, function.query_map
        return cls(
            ",".join(function.names), ",".join([KINDS[type(term)] for term in spec.terms]), solver.kernel,
            spec.scale, spec.dropout, rtol, atol,
            spec.window or 0, query_map.num_heads, int(query_map.normalize), int(query_map.reads_output),
            0 if function.value_map is None else 1 + function.value_map.normalize, solver.block, report,
        )  # fmt: skip

    @classmethod
    def of(cls, words: str, numbers: list[float], counts: list[int]) -> "_Description":
        """The description in an operator's arguments."""
        return cls._make([*words.split(";"), *numbers, *counts])

    def arguments(self) -> tuple[str, list[float], list[int]]:
        """The same as an operator takes it: words, real numbers and integers."""
        words, numbers, counts = self[:3], self[3:7], self[7:]
        return ";".join(words), list(numbers), list(counts)

    def function(self, tensors: list[Tensor]) -> AttentionMap:
        """The map that is described, for its tensors."""
        named = dict(zip(self.names.split(","), tensors, strict=True))
        past = named["past_value"].shape[-2] if "past_value" in named else 0
        kinds = self.kinds.split(",") if self.kinds else []
        terms = tuple(make_term(kind, named[f"term{i}"], past) for i, kind in enumerate(kinds))
        spec = AttentionSpec(self.scale, True, terms, self.dropout, self.window or None)
        query_map = QueryMap(self.query_heads, bool(self.normalize), bool(self.reads_output))
        value_map = ValueMap(self.query_heads, self.feedback == 2) if self.feedback else None
        return AttentionMap(spec, query_map, True, tuple(named), value_map)

    def solver(self) -> ForwardSubstitution:
        """The solver that is described."""
        return ForwardSubstitution(block=self.block, kernel=self.kernel, rtol=self.rtol, atol=self.atol or None)


def serves(solver: Method, adjoint: Adjoint, function: AttentionMap) -> bool:
    """Return whether the operator can replace a solve: forward substitution, its own adjoint, known bias terms."""
    return (
        isinstance(solver, ForwardSubstitution)
        and isinstance(adjoint, Implicit)
        and adjoint.solver is None
        and all(type(term) in KINDS for term in function.spec.terms)
    )


def solve(
    solver: ForwardSubstitution, function: AttentionMap, args: tuple[Tensor, ...], dtype: torch.dtype, report: int
) -> Solution:
    """Solve a causal map by the operator.

    Args:
        solver: The solver.
        function: The map, for which `serves` is true.
        args: Its tensors.
        dtype: Of the equilibrium.
        report: Handle of the layer's `FailureReport`.

    Returns:
        The solution, whose value carries the gradient.
    """
    described = _Description.of_map(solver, function, *solver.tolerances(dtype), report)
    value, residual, steps, converged, relative, *memo = _forward(list(args), dtype, *described.arguments())
    return Solution(value, residual, steps, converged, residual[None], relative[None], memo=tuple(memo))


@torch.library.custom_op("implicit_attention::forward_substitution", mutates_args=())
def _forward(
    tensors: list[Tensor], dtype: torch.dtype, words: str, numbers: list[float], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _Description.of(words, numbers, counts)
    if not tensors[d.names.split(",").index("key")].numel():  # an empty batch: nothing to solve
        return _outputs(tensors, dtype, words, numbers, counts)  # type: ignore[no-any-return]
    with torch.autocast(tensors[0].device.type, enabled=False):  # the solver chooses its precision itself
        solver = d.solver()
        found = solver.equilibrium(d.function(tensors), tuple(tensors), dtype)
    # What the report keeps is its own: a compiled graph may write over what it no longer needs.
    kept = {name: getattr(found, name).clone() for name in ("residual", "steps", "converged")}
    FailureReport.of(d.report)(replace(found, **kept), "equilibrium", solver)
    query, lse, inverse = found.memo
    # The trace is cloned: an operator must not return views of its other results.
    return found.value, found.residual, found.steps, found.converged, found.rel_trace[0].clone(), query, lse, inverse


@_forward.register_fake
def _outputs(
    tensors: list[Tensor], dtype: torch.dtype, words: str, numbers: list[float], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _Description.of(words, numbers, counts)
    named = dict(zip(d.names.split(","), tensors, strict=True))
    key, groups = named["key"], named["value"].shape[1]
    batch, heads, n, dim = key.shape
    wide = torch.promote_types(key.dtype, torch.float32)
    residual = key.new_empty(batch, n, dtype=wide)
    return (
        key.new_empty(batch, n, heads * dim, dtype=dtype),
        residual,
        torch.empty_like(residual, dtype=torch.long),
        torch.empty_like(residual, dtype=torch.bool),
        torch.empty_like(residual),
        key.new_empty(batch, n, groups, dim),
        key.new_empty(batch, heads, n, dtype=wide),
        key.new_empty((batch, n, groups, 1) if d.normalize else (0,), dtype=wide),
    )


@torch.library.custom_op("implicit_attention::forward_substitution_adjoint", mutates_args=())
def _adjoint(
    grad: Tensor, y: Tensor, memo: list[Tensor], tensors: list[Tensor], needs: list[bool], words: str,
    numbers: list[float], counts: list[int],
) -> list[Tensor]:  # fmt: skip
    d = _Description.of(words, numbers, counts)._replace(atol=0.0)  # cotangents have no scale of their own
    if not y.numel():
        return [t.new_zeros(t.shape) for t in tensors]
    with torch.autocast(y.device.type, enabled=False):
        solver = d.solver()
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
    y, query, lse, inverse, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    needs, plain = ctx.needs, ctx.plain  # type: ignore[attr-defined]
    found = _adjoint(grad, y, [query, lse, inverse], tensors, needs, *plain)
    return [g if need else None for g, need in zip(found, needs, strict=True)], None, *(None for _ in plain)


_forward.register_autograd(_pull, setup_context=_keep)
