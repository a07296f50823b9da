"""The solver of contractions as a registered operator (`equilibrium/operator.py`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention.contraction import Contraction
from implicit_attention.attention.map import AttentionMap, QueryMap
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.positions import DistanceSlope, OffsetTable
from implicit_attention.attention.spec import AttentionSpec, BiasTerm
from implicit_attention.equilibrium.adjoints import Adjoint, Implicit
from implicit_attention.equilibrium.operator import Plain, Results, registered
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

    @classmethod
    def of(cls, words: str, numbers: list[float], counts: list[int]) -> "_Description":
        """The description in an operator's arguments."""
        return cls._make([*words.split(";"), *numbers, *counts])

    def arguments(self) -> Plain:
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
        return Contraction(rtol=self.rtol, atol=self.atol, steps=self.steps or None)

    def outputs(self, tensors: list[Tensor], dtype: torch.dtype) -> Results:
        """Empty tensors for what a solve gives, in the order of `Described.outputs`."""
        named = dict(zip(self.names.split(","), tensors, strict=True))
        key, size, dim = named["key"], named["weight"].shape[1], named["key"].shape[-1]
        batch, n = key.shape[0], key.shape[-2] if self.by_keys else named["added"].shape[1]
        wide = torch.promote_types(key.dtype, torch.float32)
        residual = key.new_empty((batch,) if self.by_keys else (batch, n), dtype=wide)
        return (
            key.new_empty(batch, n, size, dtype=dtype),
            residual,
            torch.empty_like(residual, dtype=torch.long),
            torch.empty_like(residual, dtype=torch.bool),
            torch.empty_like(residual),
            key.new_empty(batch, n, size),
            key.new_empty(batch, self.query_heads, n, dim),
            key.new_empty(batch, size // dim, n, dtype=wide),
        )


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
    solver: Contraction, function: AttentionMap, args: tuple[Tensor, ...], dtype: torch.dtype, report: Tensor
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
        function.query_map.num_heads, int(function.rows_are_keys), solver.steps or 0,
    )  # fmt: skip
    return _solve(described, args, dtype, report)


_forward, _solve = registered("contraction", _Description.of)
