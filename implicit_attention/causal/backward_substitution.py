"""The adjoint of a causal map, block by block from the last to the first: `forward_substitution` in reverse order."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from implicit_attention.causal import engines
from implicit_attention.causal.diagonal_adjoint import BlockAdjoint, BlockAdjointSolver
from implicit_attention.causal.system import CausalSystem, Queries, halves
from implicit_attention.equilibrium.linear import largest
from implicit_attention.equilibrium.solvers.base import AdjointSolution

# Most rows of a block whose sweeps of the adjoint solve own columns exactly. That takes `(3 d H + 2 d G + H^2)` numbers
# a row: more rows take more memory, fewer make more blocks.
EXACTLY = 128


class At:
    """A known equilibrium: outputs, queries, log-sum-exp."""

    def __init__(self, system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...]) -> None:
        """Take what the memo of the solve holds; compute it if that is empty."""
        self.system = system
        self.given = y.view(*y.shape[:2], system.heads, system.dim)  # in its own dtype, as the flash kernels take it
        self.y = self.given.to(system.wide)
        self.normed = y.new_zeros(0)
        if memo:
            self.query, self.lse, self.inverse = memo[0].to(system.narrow), *memo[1:]
        if memo and system.norm_weight is None:
            return
        made = system.phi(self.y, slice(0, system.length))
        self.normed = self.normed if made.normed is None else made.normed
        if memo:
            return
        self.query = made.query.to(system.narrow)
        self.inverse = y.new_zeros(0) if made.inverse is None else made.inverse
        self.lse = system.whole_lse(self.query.transpose(1, 2))

    def queries(self, rows: slice) -> Queries:
        """Return the queries of some rows."""
        inverse = self.inverse[:, rows] if self.inverse.numel() else None
        normed = self.normed[:, rows] if self.normed.numel() else None
        return Queries(self.query[:, rows].to(self.system.wide), inverse, normed)

    def block(self, rows: slice) -> BlockAdjointSolver:
        """Return the adjoint of a diagonal block."""
        return BlockAdjointSolver(self.system, rows, self.y[:, rows], self.queries(rows), self.lse[:, :, rows])


class Backward:
    """The recursion of the adjoint, from the last block to the first.

    In rows that are not solved yet, `d_query` holds the cotangents of the queries from solved rows. `lam` may share its
    memory: a row needs its `d_query` no longer when its `lam` is stored.
    """

    def __init__(
        self, system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...], grad: Tensor, needs: tuple[bool, ...], *,
        rtol: float, kernel: str, block: int, cautious: bool = False,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            system: The map.
            y: Its equilibrium, `[B, N, D]`.
            memo: The memo of the solve; empty if another solver found the equilibrium.
            grad: Cotangent, `[B, N, D]`.
            needs: For each tensor of the map, whether its gradient is needed.
            rtol: Relative tolerance.
            kernel: The engine.
            block: Rows of a block in torch.
            cautious: Whether to read each swept block's outcome before the next block.
        """
        self.system, self.at = system, At(system, y, memo)
        self.grad, self.rtol = grad.reshape(self.at.y.shape), rtol
        self.needs = dict(zip(system.function.names, needs, strict=True))
        self.allowed = self.rtol * largest(grad).to(system.wide)
        self.bias_grad = any(need for name, need in self.needs.items() if name.startswith("term"))
        new, shape = torch.zeros, (system.batch, system.length)
        where: dict[str, Any] = {"dtype": system.wide, "device": y.device}
        self.d_query = new(*shape, system.groups, system.dim, **where)
        self.lam = self.d_query if system.groups == system.heads else new(*self.grad.shape, **where)
        parts = {n: t for n, t in system.tensors.items() if n in ("weight", "bias", "added", "self_score")}
        self.rest = {n: new(t.shape, **where) for n, t in parts.items() if self.needs[n]}
        self.d_terms: list[Tensor | None] = [None] * len(system.terms)
        self.residual = new(system.batch, **where)
        self.converged = torch.ones_like(self.residual, dtype=torch.bool)
        self.sweeps, self.near_singular = 0, 0
        engine = engines.engine(kernel)
        self.compiled: engines.AdjointKernel | None = None
        at = {"y": self.at.y, "query": self.at.query, "inverse": self.at.inverse, "lse": self.at.lse}
        at |= {"normed": self.at.normed} if self.at.normed.numel() else {}
        self.block = self.widest = engines.rows_of_block(kernel, system, block)
        if engine is not None and (engine.KEEPS_SLOPES or not self.bias_grad):
            self.compiled = engine.AdjointKernel(
                system, at, self.grad, self.d_query, self.allowed, self.block, slopes=self.bias_grad
            )
        self.swept: engines.AdjointSweeper | None = None
        self.made: Tensor | None = None
        sweeps = None
        if engine is not None and self.compiled is not None:
            sweeps, self.widest = engines.sweeper(kernel, system, block)
            self.widest = max(self.widest, engine.widest(system, self.block))
        if sweeps is not None:
            self.made = system.key.new_empty(*shape, system.groups * system.dim)
            into = {"later": self.d_query, "lam": self.lam, "d_key": self.d_key, "d_value": self.d_value,
                    "made": self.made, "own": self.rest.get("self_score")}  # fmt: skip
            at |= {"y": self.at.given}
            self.swept = sweeps.AdjointSweeps(
                system, at, self.grad, into, self.allowed, self.rtol, self.widest, cautious=cautious
            )

    @cached_property
    def d_key(self) -> Tensor:
        """The gradient of the keys. One block that takes all rows needs no sum."""
        return torch.zeros_like(self.system.key, dtype=self.system.wide, memory_format=torch.contiguous_format)

    @cached_property
    def d_value(self) -> Tensor:
        """The gradient of the values."""
        return torch.zeros_like(self.system.value, dtype=self.system.wide, memory_format=torch.contiguous_format)

    def descend(self, low: int, high: int, block: int) -> None:
        """Solve some rows, in blocks of at most so many."""
        if high - low <= block:
            self._solve(slice(low, high))
            return
        # The later half first: its solved rows send cotangents to the queries of the earlier half.
        middle = halves(low, high, block)
        self.descend(middle, high, block)
        rows, cols = self.system.seen(low, middle, high)
        if rows.start < rows.stop:
            self._carry(rows, cols)
        self.descend(low, middle, block)

    def _carry(self, rows: slice, cols: slice) -> None:
        """Carry cotangents from solved rows to earlier columns."""
        query, value = self.at.query[:, cols].transpose(1, 2), self.system.value[:, :, cols]
        d_query, d_value = self._pull(rows, query, value, self.system.past + cols.start)
        self.d_query[:, cols].transpose(1, 2).add_(d_query)
        self.d_value[:, :, cols] += d_value

    def _pull(self, rows: slice, query: Tensor, value: Tensor, first: int) -> tuple[Tensor, Tensor]:
        whole = (self.at.given[:, rows].transpose(1, 2), self.at.lse[:, :, rows])
        d_key, d_query, d_value, d_terms = self.system.below_backward(
            self.lam[:, rows].transpose(1, 2), rows, query, value, first, whole, self.bias_grad
        )
        self.d_key[:, :, rows] += d_key
        self._add_terms(d_terms)
        return d_query, d_value

    def _add_terms(self, found: tuple[Tensor | None, ...]) -> None:
        for i, part in enumerate(found):
            if part is not None:
                before = self.d_terms[i]
                self.d_terms[i] = part if before is None else before + part

    def _solve(self, rows: slice) -> None:
        n = rows.stop - rows.start
        if self.swept is not None and n > self.block:
            if not self._sweep(self.swept, rows):
                self.descend(rows.start, rows.stop, max(self.block, (n + 1) // 2))
            return
        if self.swept is not None:
            self.swept.check()
        system, found = self.system, None if self.compiled is None else self.compiled.solve(rows)
        diagonal = found is not None and not self.bias_grad  # of slope, that is all there is
        if found is None and n > self.block:  # to torch, in blocks
            compiled, self.compiled = self.compiled, None
            self.descend(rows.start, rows.stop, self.block)
            self.compiled = compiled
            return
        if found is None:
            grad, later = self.grad[:, rows].to(system.wide), self.d_query[:, rows]
            found = self.at.block(rows).solve(grad, later, self.allowed)
        self.residual = torch.maximum(self.residual, found.residual)
        self.converged &= self._within(found)
        self.sweeps = max(self.sweeps, found.sweeps)
        self.near_singular += found.near_singular
        if n == system.length:  # nothing to add to
            self.lam, self.d_key, self.d_value = found.lam, found.d_key, found.d_value
        else:
            self.lam[:, rows] = found.lam
            self.d_key[:, :, rows] += found.d_key
            self.d_value[:, :, rows] += found.d_value
        if self.made is not None:
            self.made[:, rows] = found.d_made
        else:
            self._through_map(found.d_made, rows)
        if "self_score" in self.rest:
            self.rest["self_score"][:, :, rows] = (
                found.slope[..., 0] if diagonal else found.slope.diagonal(dim1=-2, dim2=-1)
            )
        if self.bias_grad:
            at = slice(system.past + rows.start, system.past + rows.stop)
            self._add_terms(system.spec.bias_gradient(system.terms, at, at, found.slope))

    def _sweep(self, sweeper: engines.AdjointSweeper, rows: slice) -> bool:
        """Sweep a block; if it does not settle, sweep again with own columns solved exactly. Return if it settled."""
        # The first rows of a sequence have heavy own columns and take the most sweeps: sweep them in a small block.
        first, few = self.system.past + rows.start == 0, rows.stop - rows.start <= EXACTLY
        swept = (few or not first) and sweeper.solve(rows, exactly=False)
        return swept or (few and sweeper.solve(rows, exactly=True))

    def _through_map(self, d_made: Tensor, rows: slice) -> None:
        """Add the gradients of the query map's tensors from the cotangents of the linear map's output."""
        made, y = d_made.flatten(0, 1), self.at.y[:, rows].flatten(-2).flatten(0, 1)
        if "weight" in self.rest and made.dtype == y.dtype:
            self.rest["weight"].addmm_(made.mT, y)
        elif "weight" in self.rest:  # half types: one product for all rows, summed in float32, rounded once
            self.rest["weight"] += made.mT @ y.to(made.dtype)
        if "bias" in self.rest:
            self.rest["bias"] += made.sum(0, dtype=self.system.wide)
        if "added" in self.rest:
            self.rest["added"][:, rows] = d_made

    def _within(self, found: BlockAdjoint) -> Tensor:
        """Whether a block's residual is within tolerance, relative to the cotangent or to a larger solution."""
        within: Tensor = found.residual <= self.allowed
        if not bool(within.all()):  # with a gain near 1 lam is large, and the residual is at least its rounding
            larger = torch.maximum(self.allowed, self.rtol * found.lam.abs().amax((1, 2, 3)))
            within = (found.residual <= larger) & torch.isfinite(found.residual)
        return within

    def _of_norm_weight(self) -> Tensor:
        """The gradient of the weights of the queries' norm, by one more pass: kernels keep no cotangent of queries."""
        at, system = self.at, self.system
        d_query = system.query_cotangent(self.lam, at.given, at.lse, at.query)
        return (system.before_turn(d_query, slice(0, system.length)) * at.normed).sum((0, 1, 2))

    def solution(self) -> AdjointSolution:
        """Solve; return the gradients by tensor of the map. Past columns come last: all rows see them."""
        self.descend(0, self.system.length, self.widest)
        if self.swept is not None:
            self.swept.check()
            self.residual = torch.maximum(self.residual, self.swept.largest)
            self.sweeps = max(self.sweeps, self.swept.sweeps)
            self.near_singular += self.swept.near_singular
        if self.system.past:
            assert self.system.past_column is not None and self.system.past_value is not None
            everything = slice(0, self.system.length)
            past = self._pull(everything, self.system.past_column, self.system.past_value, 0)
        if self.made is not None:
            self._through_map(self.made, slice(0, self.system.length))
        by_name: dict[str, Tensor | None] = {"key": self.d_key, "value": self.d_value, **self.rest}
        if self.system.past:
            by_name |= dict(zip(("past_column", "past_value"), past, strict=True))
        by_name |= {f"term{i}": grad for i, grad in enumerate(self.d_terms)}
        if self.needs.get("norm_weight"):
            by_name["norm_weight"] = self._of_norm_weight()
        by_arg = []
        for name in self.system.tensors:
            by_arg.append(by_name.get(name) if self.needs[name] else None)
        return AdjointSolution(by_arg, self.residual, self.converged, self.sweeps, self.near_singular)
