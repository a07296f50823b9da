"""Forward substitution as a registered operator (`equilibrium/operator.py`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.map import AttentionMap, QueryMap, ValueMap
from implicit_attention.attention.operator import KINDS, make_term
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.operator import Plain, Results, registered
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
        atol: Absolute tolerance of the solver.
        window: Window of the mask, 0 for none.
        query_heads: Heads of the queries.
        normalize: Whether queries are normed, 0 or 1.
        reads_output: Whether queries read outputs, 0 or 1.
        feedback: 0 if values read no outputs, 1 if they do, 2 if they read normed ones.
        block: Rows of the solver's diagonal blocks.
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

    @classmethod
    def of_map(cls, solver: ForwardSubstitution, function: AttentionMap, rtol: float, atol: float) -> "_Description":
        """The description of a map and its solver, with the tolerances."""
        spec, query_map = function.spec, function.query_map
        return cls(
            ",".join(function.names), ",".join([KINDS[type(term)] for term in spec.terms]), solver.kernel,
            spec.scale, spec.dropout, rtol, atol,
            spec.window or 0, query_map.num_heads, int(query_map.normalize), int(query_map.reads_output),
            0 if function.value_map is None else 1 + function.value_map.normalize, solver.block,
        )  # fmt: skip

    @classmethod
    def of(cls, words: str, numbers: list[float], counts: list[int]) -> "_Description":
        """The description in an operator's arguments."""
        return cls._make([*words.split(";"), *numbers, *counts])

    def arguments(self) -> Plain:
        """The same as an operator takes it: words, real numbers and integers."""
        return ";".join(self[:3]), list(self[3:7]), list(self[7:])

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
        return ForwardSubstitution(block=self.block, kernel=self.kernel, rtol=self.rtol, atol=self.atol)

    def outputs(self, tensors: list[Tensor], dtype: torch.dtype) -> Results:
        """Empty tensors for what a solve gives, in the order of `Described.outputs`."""
        named = dict(zip(self.names.split(","), tensors, strict=True))
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
            key.new_empty((batch, n, groups, 1) if self.normalize else (0,), dtype=wide),
        )


def serves(solver: Method, adjoint: Adjoint, function: AttentionMap) -> bool:
    """Return whether the operator can replace a solve: forward substitution, its own adjoint, known bias terms."""
    return (
        isinstance(solver, ForwardSubstitution)
        and isinstance(adjoint, Implicit)
        and adjoint.solver is None
        and all(type(term) in KINDS for term in function.spec.terms)
    )


def solve(
    solver: ForwardSubstitution, function: AttentionMap, args: tuple[Tensor, ...], dtype: torch.dtype, report: Tensor
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
    described = _Description.of_map(solver, function, *solver.tolerances(dtype))
    return _solve(described, args, dtype, report)


_forward, _solve = registered("forward_substitution", _Description.of)
