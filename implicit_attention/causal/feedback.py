"""Causal maps whose values read outputs: row by row within a block, one attention pass between blocks.

Row i sees the columns `(q_j, u_j)` of earlier rows, `q_j = phi(y_j)` and `u_j = v_j + Psi_V y_j`, and its own column
with a score and a value that are known before. So each row follows from the rows before it: there is no equation to
solve and nothing to iterate. A state that is handed from row to row makes a chain through all of them: sweeps over a
block would settle one row each. The adjoint goes from the last row to the first.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from implicit_attention.causal.feedback_rows import State, TorchAdjoint, TorchForward, Values
from implicit_attention.causal.system import CausalSystem, merge
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.equilibrium.solvers.solution import AdjointSolution
from implicit_attention.errors import NonFiniteError, all_finite


class ForwardKernel(Protocol):
    """Solves the rows of a block in place."""

    def settle(self, rows: slice) -> None:
        """Turn attention to the columns before the block, in `y` and `lse`, into the solution of its rows."""


class AdjointKernel(Protocol):
    """Solves the adjoint of the rows of a block in place."""

    def solve(self, rows: slice) -> Tensor | None:
        """Solve the rows; return the cotangents of their scores on each other, `[B, H, n, n]`, if they are wanted."""


class Engine(Protocol):
    """What solves blocks.

    Attributes:
        ForwardKernel: Makes a kernel from the system and what `Forward.state` holds.
        AdjointKernel: Makes a kernel from the system, what `Backward.state` holds, and whether slopes are wanted.
    """

    ForwardKernel: Callable[[CausalSystem, State], ForwardKernel]
    AdjointKernel: Callable[[CausalSystem, State, bool], AdjointKernel]

    def block(self, system: CausalSystem, least: int) -> int:
        """Return how many rows a block has, at least `least`."""


class Forward:
    """The solution, block after block.

    `state` holds `y` `[B, N, H, d]` and `lse` `[B, H, N]` in the wide dtype, `query` and `value` `[B, N, G, d]` in the
    narrow one, and `inverse` `[B, N, G, 1]`, empty without a norm of the queries.
    """

    def __init__(self, system: CausalSystem, engine: Engine | None, block: int) -> None:
        self.system, self.block = system, block if engine is None else engine.block(system, block)
        new, shape = system.key.new_zeros, (system.batch, system.length)
        wide = system.wide
        normed = system.function.query_map.normalize
        self.state = {
            "y": new(*shape, system.heads, system.dim, dtype=wide),
            "lse": new(system.batch, system.heads, system.length, dtype=wide).fill_(-torch.inf),
            "query": new(*shape, system.groups, system.dim),
            "value": new(*shape, system.groups, system.dim),
            "inverse": new(*shape, system.groups, 1, dtype=wide) if normed else new(0, dtype=wide),
        }
        self.kernel = (TorchForward if engine is None else engine.ForwardKernel)(system, self.state)

    def solution(self, dtype: torch.dtype) -> Solution:
        """Solve all rows.

        Args:
            dtype: Of the equilibrium.

        Returns:
            The solution. Its residuals are 0: there is no equation to miss.

        Raises:
            NonFiniteError: If an output or a value is NaN or Inf, or an output is so large that its norm is.
        """
        system, state = self.system, self.state
        for rows in _blocks(system.length, self.block):
            for query, value, first in _seen(system, state, rows):
                out, lse = system.below(rows, query, value, first)
                merge(state["y"][:, rows].transpose(1, 2), state["lse"][:, :, rows], out.to(system.wide), lse)
            self.kernel.settle(rows)
        size = state["y"].abs().amax((2, 3))
        # What overflows in the last rows no row of this call has seen; a cache would keep it.
        if not (all_finite(self._squares(size)) and all_finite(state["value"])):
            raise NonFiniteError("the map gave NaN or Inf")
        zero = torch.zeros_like(size)
        return Solution(
            value=state["y"].flatten(-2).to(dtype),
            residual=zero,
            steps=torch.ones_like(size, dtype=torch.long),
            converged=torch.ones_like(size, dtype=torch.bool),
            abs_trace=zero[None],
            rel_trace=zero[None],
            evaluations=1,
            memo=(state["query"], state["lse"], state["inverse"]),
        )

    def _squares(self, size: Tensor) -> Tensor:
        """Bounds of the sums of squares that the norm of outputs takes, from their largest entries."""
        assert self.system.value_map is not None
        return size.square() * self.system.heads * self.system.dim if self.system.value_map.normalize else size


class Backward:
    """The adjoint, from the last block to the first.

    `state` holds the solution as in `Forward`, `grad` `[B, N, H, d]`, and what is found: `lam` `[B, N, H, d]`,
    `d_query` and `d_value` `[B, N, G, d]` (of what later rows see), `d_made` `[B, N, G d]` (of the query map's linear
    part), `d_key` `[B, H, N, d]`, `d_own_value` `[B, G, N, d]` and `own_slope` `[B, H, N]` (of own columns).
    """

    def __init__(
        self,
        system: CausalSystem,
        engine: Engine | None,
        block: int,
        y: Tensor,
        memo: tuple[Tensor, ...],
        grad: Tensor,
        needs: tuple[bool, ...],
    ) -> None:
        """Prepare.

        Args:
            system: The map.
            engine: What solves blocks; None for torch.
            block: Rows of a block, at least.
            y: The equilibrium, `[B, N, D]`.
            memo: That of `Forward.solution`; empty if another solver found the equilibrium.
            grad: Cotangent, `[B, N, D]`.
            needs: For each tensor of the map, whether its gradient is needed.
        """
        self.system, self.needs = system, dict(zip(system.tensors, needs, strict=True))
        self.block = block if engine is None else engine.block(system, block)
        self.bias_grad = any(need for name, need in self.needs.items() if name.startswith("term"))
        new, shape, wide = torch.zeros, (system.batch, system.length), system.wide
        columns = {name: (*shape, system.groups, system.dim) for name in ("d_query", "d_value")}
        sizes = columns | {
            "lam": (*shape, system.heads, system.dim), "d_made": (*shape, system.groups * system.dim),
            "d_key": tuple(system.key.shape), "d_own_value": tuple(system.value.shape),
            "own_slope": tuple(system.key.shape[:3]),
        }  # fmt: skip
        grad = grad.view(*shape, system.heads, system.dim)
        self.state = _solved(system, y, memo) | {"grad": grad} | {
            name: new(*size, dtype=wide, device=grad.device) for name, size in sizes.items()
        }  # fmt: skip
        self.d_terms: list[Tensor | None] = [None] * len(system.terms)
        self.kernel = (TorchAdjoint if engine is None else engine.AdjointKernel)(system, self.state, self.bias_grad)
        self.d_past = [
            torch.zeros_like(t, dtype=wide) for t in (system.past_column, system.past_value) if t is not None
        ]

    def solution(self) -> AdjointSolution:
        """Solve; return the gradients by tensor of the map."""
        system, state = self.system, self.state
        for rows in reversed(_blocks(system.length, self.block)):
            slope = self.kernel.solve(rows)
            if slope is not None:
                at = slice(system.past + rows.start, system.past + rows.stop)
                self._add_terms(system.spec.bias_gradient(system.terms, at, at, slope))
            for query, value, first in _seen(system, state, rows):
                self._carry(rows, query, value, first)
        found = self._gradients()
        by_arg = [found.get(name) if self.needs[name] else None for name in system.tensors]
        finite = torch.isfinite(state["lam"]).flatten(1).all(1)
        residual = torch.where(finite, 0.0, torch.nan).to(system.wide)
        return AdjointSolution(by_arg, residual, finite, 1, 0)

    def _carry(self, rows: slice, query: Tensor, value: Tensor, first: int) -> None:
        """Carry cotangents from solved rows to earlier columns."""
        system, state = self.system, self.state
        whole = (state["y"][:, rows].transpose(1, 2).to(system.narrow), state["lse"][:, :, rows])
        d_key, d_query, d_value, d_terms = system.below_backward(
            state["lam"][:, rows].transpose(1, 2), rows, query, value, first, whole, self.bias_grad
        )
        state["d_key"][:, :, rows] += d_key
        self._add_terms(d_terms)
        if first < system.past:
            into = [t[:, :, first:] for t in self.d_past]
        else:
            cols = slice(first - system.past, rows.start)
            into = [state[name][:, cols].transpose(1, 2) for name in ("d_query", "d_value")]
        into[0].add_(d_query)
        into[1].add_(d_value)

    def _add_terms(self, found: tuple[Tensor | None, ...]) -> None:
        pairs = zip(self.d_terms, found, strict=True)
        self.d_terms = [a if b is None else b if a is None else a + b for a, b in pairs]

    def _gradients(self) -> dict[str, Tensor | None]:
        system, state = self.system, self.state
        made, y = state["d_made"].flatten(0, 1), state["y"].flatten(-2).flatten(0, 1)
        found: dict[str, Tensor | None] = {
            "key": state["d_key"], "value": state["d_value"].transpose(1, 2) + state["d_own_value"],
            "self_score": state["own_slope"], "weight": made.mT @ y, "bias": made.sum(0), "added": state["d_made"],
        }  # fmt: skip
        if system.norm_weight is not None:
            everything = slice(0, system.length)
            normed = system.phi(state["y"], everything).normed
            assert normed is not None
            found["norm_weight"] = (system.before_turn(state["d_query"], everything) * normed).sum((0, 1, 2))
        found |= Values(system).gradients(state["d_value"], state["y"])
        found |= dict(zip(("past_column", "past_value"), self.d_past, strict=False))
        return found | {f"term{i}": grad for i, grad in enumerate(self.d_terms)}


def _solved(system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...]) -> State:
    """The state of a known solution."""
    everything = slice(0, system.length)
    y = y.view(*y.shape[:2], system.heads, system.dim).to(system.wide)
    value = Values(system).made(y, everything)
    if memo:
        query, lse, inverse = memo
        return {"y": y, "query": query.to(system.narrow), "lse": lse, "inverse": inverse, "value": value}
    made = system.phi(y, everything)
    query = made.query.to(system.narrow)
    inverse = y.new_zeros(0) if made.inverse is None else made.inverse
    lse = system.whole_lse(query.transpose(1, 2))
    return {"y": y, "query": query, "lse": lse, "inverse": inverse, "value": value}


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(low, min(low + block, length)) for low in range(0, length, block)]


def _seen(system: CausalSystem, state: State, rows: slice) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The columns before a block that its rows see: queries, values `[B, G, c, d]`, and the first column's number."""
    first = 0 if system.spec.window is None else max(0, system.past + rows.start - system.spec.window + 1)
    if first < system.past:
        assert system.past_column is not None and system.past_value is not None
        yield system.past_column[:, :, first:], system.past_value[:, :, first:], first
    cols = slice(max(0, first - system.past), rows.start)
    if cols.start < cols.stop:
        query, value = (state[name][:, cols].transpose(1, 2) for name in ("query", "value"))
        yield query, value, system.past + cols.start
