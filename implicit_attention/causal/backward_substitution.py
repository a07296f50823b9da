"""The adjoint of a causal map, block by block from the last to the first: `forward_substitution` in reverse order."""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from implicit_attention.causal import engines
from implicit_attention.causal.diagonal_adjoint import BlockAdjoint, BlockAdjointSolver
from implicit_attention.causal.system import CausalSystem, Queries, halves
from implicit_attention.equilibrium.linear import largest
from implicit_attention.equilibrium.solvers.solution import AdjointSolution

# Most rows of a block whose sweeps of the adjoint solve own columns exactly. That takes `(3 d H + 2 d G + H^2)` numbers
# a row: more rows take more memory, fewer make more blocks.
EXACTLY = 128


class Equilibrium:
    """A known equilibrium: outputs, queries, log-sum-exp.

    Attributes:
        y: Outputs `[B, N, H, d]`, in the wide dtype; `y_given` in their own, as the flash kernels take them.
        query: `[B, N, G, d]`, normed and rotated, in the narrow dtype.
        inverse: `[B, N, G, 1]`, factors of the queries' norm; empty without a norm.
        normed: `[B, N, G, d]`, queries before the weights of the norm; empty without weights.
        lse: Log-sum-exp `[B, H, N]`.
    """

    def __init__(self, system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...]) -> None:
        """Take what the memo of the solve holds; compute it if that is empty."""
        self.system = system
        self.y_given = y.view(*y.shape[:2], system.heads, system.dim)
        self.y = self.y_given.to(system.wide)
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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as kernels take them."""
        found = {"y": self.y, "query": self.query, "inverse": self.inverse, "lse": self.lse}
        return found | ({"normed": self.normed} if self.normed.numel() else {})


class Backward:
    """The recursion of the adjoint, from the last block to the first.

    A block solves `lam = g + J^T lam` for its rows, with the cotangents of its queries from all later rows. Its `lam`
    then adds to the cotangents of all earlier queries and values, once, by the backward pass of attention.

    Attributes:
        lam: The solution, `[B, N, H, d]`, in rows that are solved.
        d_query: Cotangents of the queries from solved rows, `[B, N, G, d]`. `lam` may share this memory: a row needs
            its `d_query` no longer when its `lam` is stored.
        d_made: Cotangents of the queries before norm and rotation, `[B, N, G d]`, where sweeps fill them; else None.
        grads: Gradients of the tensors that make queries and own scores, by name, if needed.
        d_terms: Gradients of the biases.
        block: Rows of a block for the engine's kernel, or for torch.
        widest: Rows of the first blocks: more than `block` if the engine has sweeps over many rows.
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
        self.system, self.equilibrium = system, Equilibrium(system, y, memo)
        self.grad, self.rtol = grad.reshape(self.equilibrium.y.shape), rtol
        self.allowed = rtol * largest(grad).to(system.wide)
        self.needs = dict(zip(system.function.names, needs, strict=True))
        self.bias_grad = any(need for name, need in self.needs.items() if name.startswith("term"))
        zeros = partial(torch.zeros, dtype=system.wide, device=y.device)
        self.d_query = zeros(system.batch, system.length, system.groups, system.dim)
        self.lam = self.d_query if system.groups == system.heads else zeros(self.grad.shape)
        summed = ("weight", "bias", "added", "self_score")
        self.grads = {n: zeros(t.shape) for n, t in system.tensors.items() if n in summed and self.needs[n]}
        self.d_terms: list[Tensor | None] = [None] * len(system.terms)
        self.residual = zeros(system.batch)
        self.converged = torch.ones_like(self.residual, dtype=torch.bool)
        self.sweeps, self.near_singular = 0, 0
        self.block = self.widest = engines.rows_of_block(kernel, system, block)
        self.kernel: engines.AdjointKernel | None = None
        self.sweeper: engines.AdjointSweeper | None = None
        self.d_made: Tensor | None = None
        engine = engines.engine(kernel)
        if engine is not None and (engine.KEEPS_SLOPES or not self.bias_grad):
            self.kernel = engine.AdjointKernel(
                system, self.equilibrium.tensors(), self.grad, self.d_query, self.allowed, self.block,
                slopes=self.bias_grad,
            )  # fmt: skip
            sweeps, self.widest = engines.sweeper(kernel, system, block)
            self.widest = max(self.widest, engine.widest(system, self.block))
            if sweeps is not None:
                self._make_sweeper(sweeps, cautious)

    def _make_sweeper(self, sweeps: Any, cautious: bool) -> None:
        """Make what sweeps over blocks of many rows, from the engine's module of sweeps."""
        system = self.system
        self.d_made = system.key.new_empty(system.batch, system.length, system.groups * system.dim)
        into = {"later": self.d_query, "lam": self.lam, "d_key": self.d_key, "d_value": self.d_value,
                "made": self.d_made, "own": self.grads.get("self_score")}  # fmt: skip
        at = self.equilibrium.tensors() | {"y": self.equilibrium.y_given}
        self.sweeper = sweeps.AdjointSweeps(
            system, at, self.grad, into, self.allowed, self.rtol, self.widest, cautious=cautious
        )

    @cached_property
    def d_key(self) -> Tensor:
        """The gradient of the keys, zero at first. A block that takes all rows puts its own here instead."""
        return torch.zeros_like(self.system.key, dtype=self.system.wide, memory_format=torch.contiguous_format)

    @cached_property
    def d_value(self) -> Tensor:
        """The gradient of the values; as `d_key`."""
        return torch.zeros_like(self.system.value, dtype=self.system.wide, memory_format=torch.contiguous_format)

    def solution(self) -> AdjointSolution:
        """Solve; return the gradients by tensor of the map."""
        system = self.system
        self.descend(0, system.length, self.widest)
        if self.sweeper is not None:
            self.sweeper.check()
            self.residual = torch.maximum(self.residual, self.sweeper.largest)
            self.sweeps = max(self.sweeps, self.sweeper.sweeps)
            self.near_singular += self.sweeper.near_singular
        by_name: dict[str, Tensor | None] = {}
        if system.past:  # all rows see these columns, so they come last
            assert system.past_column is not None and system.past_value is not None
            past = self._attention_backward(slice(0, system.length), system.past_column, system.past_value, 0)
            by_name |= dict(zip(("past_column", "past_value"), past, strict=True))
        if self.d_made is not None:
            self._add_map_gradients(self.d_made, slice(0, system.length))
        by_name |= {"key": self.d_key, "value": self.d_value, **self.grads}
        by_name |= {f"term{i}": grad for i, grad in enumerate(self.d_terms)}
        if self.needs.get("norm_weight"):
            by_name["norm_weight"] = self._norm_weight_gradient()
        by_arg = [by_name.get(name) if self.needs[name] else None for name in system.tensors]
        return AdjointSolution(by_arg, self.residual, self.converged, self.sweeps, self.near_singular)

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
            self._add_to_columns(rows, cols)
        self.descend(low, middle, block)

    def _add_to_columns(self, rows: slice, cols: slice) -> None:
        """Add the cotangents from solved rows to the queries and values of earlier columns."""
        query, value = self.equilibrium.query[:, cols].transpose(1, 2), self.system.value[:, :, cols]
        d_query, d_value = self._attention_backward(rows, query, value, self.system.past + cols.start)
        self.d_query[:, cols].transpose(1, 2).add_(d_query)
        self.d_value[:, :, cols] += d_value

    def _attention_backward(self, rows: slice, query: Tensor, value: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return the cotangents of some columns' queries and values; add those of the rows' keys and biases."""
        whole = (self.equilibrium.y_given[:, rows].transpose(1, 2), self.equilibrium.lse[:, :, rows])
        d_key, d_query, d_value, d_terms = self.system.below_backward(
            self.lam[:, rows].transpose(1, 2), rows, query, value, first, whole, self.bias_grad
        )
        self.d_key[:, :, rows] += d_key
        self._add_terms(d_terms)
        return d_query, d_value

    def _solve(self, rows: slice) -> None:
        """Solve a block: by sweeps if it has many rows, else by the engine's kernel, else in torch."""
        n = rows.stop - rows.start
        if self.sweeper is not None and n > self.block:
            if not self._sweep(self.sweeper, rows):
                self.descend(rows.start, rows.stop, max(self.block, (n + 1) // 2))
            return
        if self.sweeper is not None:  # the cotangents of these rows come from the last swept block
            self.sweeper.check()
        found = None if self.kernel is None else self.kernel.solve(rows)
        if found is not None:
            self._store(found, rows)
        elif n > self.block:  # the kernel took more rows than torch does, and gave up: torch takes them, block by block
            kernel, self.kernel = self.kernel, None
            self.descend(rows.start, rows.stop, self.block)
            self.kernel = kernel
        else:
            grad = self.grad[:, rows].to(self.system.wide)
            self._store(self.equilibrium.block(rows).solve(grad, self.d_query[:, rows], self.allowed), rows)

    def _sweep(self, sweeper: engines.AdjointSweeper, rows: slice) -> bool:
        """Sweep a block; if it does not settle, sweep again with own columns solved exactly. Return if it settled."""
        # The first rows of a sequence have heavy own columns and take the most sweeps: sweep them in a small block.
        first, few = self.system.past + rows.start == 0, rows.stop - rows.start <= EXACTLY
        swept = (few or not first) and sweeper.solve(rows, exactly=False)
        return swept or (few and sweeper.solve(rows, exactly=True))

    def _store(self, found: BlockAdjoint, rows: slice) -> None:
        """Store the solution of a block, and add its gradients."""
        self.residual = torch.maximum(self.residual, found.residual)
        self.converged &= self._within(found)
        self.sweeps = max(self.sweeps, found.sweeps)
        self.near_singular += found.near_singular
        if rows.stop - rows.start == self.system.length:  # nothing to add to
            self.lam, self.d_key, self.d_value = found.lam, found.d_key, found.d_value
        else:
            self.lam[:, rows] = found.lam
            self.d_key[:, :, rows] += found.d_key
            self.d_value[:, :, rows] += found.d_value
        if self.d_made is not None:
            self.d_made[:, rows] = found.d_made
        else:
            self._add_map_gradients(found.d_made, rows)
        if "self_score" in self.grads:
            whole = found.slope.shape[-1] == rows.stop - rows.start  # else the diagonal alone, `[B, H, n, 1]`
            own = found.slope.diagonal(dim1=-2, dim2=-1) if whole else found.slope[..., 0]
            self.grads["self_score"][:, :, rows] = own
        if self.bias_grad:
            at = slice(self.system.past + rows.start, self.system.past + rows.stop)
            self._add_terms(self.system.spec.bias_gradient(self.system.terms, at, at, found.slope))

    def _within(self, found: BlockAdjoint) -> Tensor:
        """Whether a block's residual is within tolerance, relative to the cotangent or to a larger solution."""
        within: Tensor = found.residual <= self.allowed
        if not bool(within.all()):  # with a gain near 1 lam is large, and the residual is at least its rounding
            larger = torch.maximum(self.allowed, self.rtol * found.lam.abs().amax((1, 2, 3)))
            within = (found.residual <= larger) & torch.isfinite(found.residual)
        return within

    def _add_terms(self, found: tuple[Tensor | None, ...]) -> None:
        """Add to the gradients of the biases."""
        for i, part in enumerate(found):
            if part is not None:
                before = self.d_terms[i]
                self.d_terms[i] = part if before is None else before + part

    def _add_map_gradients(self, d_made: Tensor, rows: slice) -> None:
        """Add the gradients of `made = y Omega_Q^T + bias + added` from the cotangents of `made`."""
        made, y = d_made.flatten(0, 1), self.equilibrium.y[:, rows].flatten(-2).flatten(0, 1)
        if "weight" in self.grads and made.dtype == y.dtype:
            self.grads["weight"].addmm_(made.mT, y)
        elif "weight" in self.grads:  # half types: one product for all rows, summed in float32, rounded once
            self.grads["weight"] += made.mT @ y.to(made.dtype)
        if "bias" in self.grads:
            self.grads["bias"] += made.sum(0, dtype=self.system.wide)
        if "added" in self.grads:
            self.grads["added"][:, rows] = d_made

    def _norm_weight_gradient(self) -> Tensor:
        """The gradient of the weights of the queries' norm, by one more pass: kernels keep no cotangent of queries."""
        at, system = self.equilibrium, self.system
        d_query = system.query_cotangent(self.lam, at.y_given, at.lse, at.query)
        return (system.before_turn(d_query, slice(0, system.length)) * at.normed).sum((0, 1, 2))
