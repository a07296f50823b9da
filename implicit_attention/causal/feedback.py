"""Causal maps whose values read outputs: row by row within a block, one attention pass between blocks.

Row i sees the columns `(q_j, u_j)` of earlier rows, `q_j = phi(y_j)` and `u_j = v_j + Psi_V y_j`, and its own column
with a score and a value that are known before. So each row follows from the rows before it: there is no equation to
solve and nothing to iterate. A state that is handed from row to row makes a chain through all of them, which sweeps over a block
would follow by one row each. The adjoint goes from the last row to the first.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention.map import NORM_EPS
from implicit_attention.causal.diagonal import DiagonalBlock
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.equilibrium.solvers.base import AdjointSolution
from implicit_attention.errors import NonFiniteError

State = dict[str, Tensor]


class Values:
    """The values that later rows see, made from outputs, in the layout of a `CausalSystem`."""

    def __init__(self, system: CausalSystem) -> None:
        """Take the tensors of the value map.

        Args:
            system: A map with a `value_map`.
        """
        assert system.value_map is not None
        self.system, self.normalize = system, system.value_map.normalize
        self.weight, self.bias = system.tensors["feedback"], system.tensors.get("feedback_bias")

    def made(self, y: Tensor, rows: slice) -> Tensor:
        """Return the values `[B, n, G, d]` of some rows for their outputs `[B, n, H, d]`, in the narrow dtype."""
        system = self.system
        added = F.linear(self._read(y)[0].to(system.narrow), self.weight, self.bias)
        return system.value[:, :, rows].transpose(1, 2) + added.view(*y.shape[:2], system.groups, system.dim)

    def pull(self, d_value: Tensor, y: Tensor) -> Tensor:
        """Return the cotangent of outputs `[B, n, H, d]` from that of their values `[B, n, G, d]`."""
        d_read = (d_value.flatten(-2).to(self.system.narrow) @ self.weight).to(y.dtype)
        read, inverse = self._read(y)
        if inverse is not None:
            along = (d_read * read).mean(-1, keepdim=True)
            d_read = torch.addcmul(d_read, read, along, value=-1.0).mul_(inverse)
        return d_read.view(y.shape)

    def gradients(self, d_value: Tensor, y: Tensor) -> State:
        """Return the gradients of the map's tensors, from those of all values and all outputs."""
        made = d_value.flatten(-2).flatten(0, 1)
        read = self._read(y)[0].flatten(0, 1)
        return {"feedback": made.mT @ read.to(made.dtype), "feedback_bias": made.sum(0)}

    def _read(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `Psi_V` reads, `[B, n, D]`, and the norm's factor `[B, n, 1]`."""
        flat = y.flatten(-2)
        if not self.normalize:
            return flat, None
        inverse = (flat * flat).mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()
        return flat * inverse, inverse


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


class TorchForward:
    """In torch's operations."""

    def __init__(self, system: CausalSystem, state: State) -> None:
        """Take the tensors.

        Args:
            system: The map.
            state: As `Forward.state`.
        """
        self.system, self.state, self.values = system, state, Values(system)

    def settle(self, rows: slice) -> None:
        """Solve the rows of a block, one after the other."""
        system, state, block = self.system, self.state, DiagonalBlock(self.system, rows)
        assert block.given_own is not None
        lse, y = state["lse"][:, :, rows], state["y"][:, rows].transpose(1, 2)
        query, value = (state[name][:, rows].transpose(1, 2) for name in ("query", "value"))
        _merge(y, lse, block.own_value, block.given_own)
        strict, groups = block.strict.expand(*block.shape, block.n), (system.batch, system.groups, -1)
        for i in range(block.n):
            if i:
                key = block.key[:, :, i].reshape(*groups, system.dim)
                scores = (key @ query[:, :, :i].to(key.dtype).mT).view(*block.shape[:2], i) + strict[:, :, i, :i]
                inner = scores.logsumexp(-1)
                weights = (scores - _finite(inner)[..., None]).exp_()
                weights = weights if block.keep is None else weights * block.keep[:, :, i, :i]
                out = weights.view(*groups, i) @ value[:, :, :i].to(key.dtype)
                _merge(y[:, :, i], lse[:, :, i], out.view(*block.shape[:2], system.dim), inner)
            at = slice(rows.start + i, rows.start + i + 1)
            made = system.phi(state["y"][:, at], at)
            state["query"][:, at], state["value"][:, at] = made.query, self.values.made(state["y"][:, at], at)
            if made.inverse is not None:
                state["inverse"][:, at] = made.inverse


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge attention over more columns into `out` and `lse`, in place."""
    total = torch.logaddexp(lse, more_lse)
    share = torch.exp(more_lse - _finite(total))[..., None]
    out.lerp_(more, share)
    lse.copy_(total)


def _finite(lse: Tensor) -> Tensor:
    """The same, finite: rows that have seen no column get weights exp(-inf) = 0, not NaN."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


class TorchAdjoint:
    """In torch's operations."""

    def __init__(self, system: CausalSystem, state: State, slopes: bool) -> None:
        """Take the tensors.

        Args:
            system: The map.
            state: As `Backward.state`.
            slopes: Whether the cotangents of all scores are wanted.
        """
        self.system, self.state, self.slopes, self.values = system, state, slopes, Values(system)

    def solve(self, rows: slice) -> Tensor | None:
        """Solve the rows of a block, the last first; return the cotangents of their scores if they are wanted."""
        system, state, block = self.system, self.state, DiagonalBlock(self.system, rows)
        y, lam = state["y"][:, rows].transpose(1, 2), state["lam"][:, rows].transpose(1, 2)
        query, value = (state[name][:, rows].to(system.wide) for name in ("query", "value"))
        weights, own = self._weights(block, query, state["lse"][:, :, rows])
        kept = weights if block.keep is None else weights * block.keep
        slope, own_slope = torch.zeros_like(weights), torch.zeros_like(own)
        groups = (system.batch, system.groups, -1)
        for j in reversed(range(block.n)):
            at = slice(rows.start + j, rows.start + j + 1)
            d_query, d_value = state["d_query"][:, rows.start + j], state["d_value"][:, rows.start + j]
            later = slice(j + 1, block.n)
            d_query += self._gathered(slope[:, :, later, j], block.key[:, :, later])
            d_value += self._gathered(kept[:, :, later, j], lam[:, :, later])
            lam[:, :, j] = self._pulled(at, d_query[:, None], d_value[:, None])[:, 0]
            along = (lam[:, :, j] * y[:, :, j]).sum(-1)
            own_slope[:, :, j] = own[:, :, j] * ((lam[:, :, j] * block.own_value[:, :, j]).sum(-1) - along)
            if j:
                seen = lam[:, :, j].reshape(*groups, system.dim) @ value[:, :j].permute(0, 2, 3, 1)
                seen = seen.view(*block.shape[:2], j)
                seen = seen if block.keep is None else seen * block.keep[:, :, j, :j]
                slope[:, :, j, :j] = weights[:, :, j, :j] * (seen - along[..., None])
        columns = system.per_head(query.transpose(1, 2))
        state["d_key"][:, :, rows] += (slope @ columns).mul_(system.spec.scale)
        own_share = own if block.keep is None else own * block.keep.diagonal(dim1=-2, dim2=-1)
        own_value = (own_share[..., None] * lam).view(*groups, block.n, system.dim).sum(2)
        state["d_own_value"][:, :, rows] = own_value
        state["own_slope"][:, :, rows] = own_slope
        return slope + torch.diag_embed(own_slope) if self.slopes else None

    def _weights(self, block: DiagonalBlock, query: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of rows on earlier rows of the block, `[B, H, n, n]`, and on their own columns `[B, H, n]`."""
        assert block.given_own is not None
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        weights = (block.scores(query) + block.strict).sub_(seen[..., None]).exp_()
        return weights, (block.given_own - seen).exp_()

    def _gathered(self, shares: Tensor, rows: Tensor) -> Tensor:
        """The sum of rows `[B, H, m, d]` with their shares `[B, H, m]`, over the heads of a group, `[B, G, d]`."""
        found = (shares[:, :, None] @ rows)[:, :, 0]
        return found.view(len(found), self.system.groups, -1, self.system.dim).sum(2)

    def _pulled(self, at: slice, d_query: Tensor, d_value: Tensor) -> Tensor:
        """The cotangent of one row's output, `[B, 1, H, d]`, from those of its query and value `[B, 1, G, d]`."""
        system, state = self.system, self.state
        y = state["y"][:, at]
        lam = state["grad"][:, at].to(system.wide) + self.values.pull(d_value, y)
        inverse = state["inverse"][:, at] if state["inverse"].numel() else None
        made = system.before_map(d_query, Queries(state["query"][:, at].to(system.wide), inverse), at)
        state["d_made"][:, at] = made
        return lam + system.through_map(made) if system.reads_output else lam


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
            NonFiniteError: If an output is NaN or Inf.
        """
        system, state = self.system, self.state
        for rows in _blocks(system.length, self.block):
            for query, value, first in _seen(system, state, rows):
                out, lse = system.below(rows, query, value, first)
                _merge(state["y"][:, rows].transpose(1, 2), state["lse"][:, :, rows], out.to(system.wide), lse)
            self.kernel.settle(rows)
        size = state["y"].abs().amax((2, 3))
        if not bool(torch.isfinite(size).all()):
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
        solved: State,
        grad: Tensor,
        needs: dict[str, bool],
    ) -> None:
        self.system, self.needs = system, needs
        self.block = block if engine is None else engine.block(system, block)
        self.bias_grad = any(need for name, need in needs.items() if name.startswith("term"))
        new, shape, wide = torch.zeros, (system.batch, system.length), system.wide
        columns = {name: (*shape, system.groups, system.dim) for name in ("d_query", "d_value")}
        sizes = columns | {
            "lam": (*shape, system.heads, system.dim), "d_made": (*shape, system.groups * system.dim),
            "d_key": tuple(system.key.shape), "d_own_value": tuple(system.value.shape),
            "own_slope": tuple(system.key.shape[:3]),
        }  # fmt: skip
        self.state = solved | {"grad": grad} | {
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
        found |= Values(system).gradients(state["d_value"], state["y"])
        found |= dict(zip(("past_column", "past_value"), self.d_past, strict=False))
        return found | {f"term{i}": grad for i, grad in enumerate(self.d_terms)}


def solved(system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...]) -> State:
    """Return the state of a known solution.

    Args:
        system: The map.
        y: The equilibrium, `[B, N, D]`.
        memo: That of `Forward.solution`; empty if another solver found the equilibrium.
    """
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
