"""Forward substitution: the exact equilibrium of a causal map, block by block, and its adjoint in reverse order.

Under a causal mask row i depends only on rows j <= i. So attention between blocks is computed once, by PyTorch's flash
kernel, and merged by log-sum-exp. Only the diagonal blocks are iterated (`diagonal`). The adjoint is the same recursion
in reverse order.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention.map import AttentionMap
from implicit_attention.causal import engines, feedback
from implicit_attention.causal.diagonal import BlockAdjoint, BlockAdjointSolver, BlockSolver, Unsettled, own_jacobian
from implicit_attention.causal.row_problem import gelfand_radius
from implicit_attention.causal.system import CausalSystem, Queries
from implicit_attention.equilibrium.linear import largest
from implicit_attention.equilibrium.solvers import NewtonKrylov, Solution, Solver
from implicit_attention.equilibrium.solvers.base import AdjointSolution, DirectSolver
from implicit_attention.errors import Came, bad_type, bad_value, check_choice, check_positive

# Most rows of a block whose sweeps of the adjoint solve own columns exactly. That takes `(3 d H + 2 d G + H^2)` numbers
# a row: more rows take more memory, fewer make more blocks.
EXACTLY = 128
# Rows that go to torch together when a compiled kernel gives up on the first of them. More rows share torch's launch
# overhead, but some of them the kernel could have solved.
HANDED_OVER = 4


@dataclass(frozen=True, kw_only=True)
class ForwardSubstitution(DirectSolver):
    """The exact solver of causal maps, for any weights: about one attention pass plus the diagonal blocks.

    Attributes:
        block: Rows of a diagonal block. A block that does not settle is halved, down to single rows. Compiled kernels
            take wider blocks.
        kernel: What computes the diagonal blocks. "auto" takes the C++ kernels on a CPU and torch elsewhere. "cpp" is
            the C++ kernels, part of the package. "triton" (the extra `gpu`) is for CUDA devices, without dropout.
            "torch" serves everywhere, several times slower. See `kernel_for`.
        fallback: Iterative solver for equations without a known causal structure: adjoints that are differentiated
            again, or taken under torch.func transforms.

    Reference:
        The recursion is that of blocked triangular solves. The Recurrent Transformer (arXiv 2604.21215) also computes
        each off-diagonal block once.
    """

    block: int = 64
    kernel: str = "auto"
    fallback: Solver = field(default_factory=NewtonKrylov)

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("block", self.block, integer=True)
        object.__setattr__(self, "kernel", engines.RENAMED.get(self.kernel, self.kernel))
        check_choice("kernel", self.kernel, engines.KERNELS)
        if not isinstance(self.fallback, Solver):
            raise bad_type("fallback", "an iterative solver such as NewtonKrylov()", self.fallback)

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return (
            "Raise the tolerances (ForwardSubstitution(rtol=..., atol=...)), compute in a wider dtype, keep scores "
            'small (qk_norm=True, smaller inputs), or use self_query="input".'
        )

    def equilibrium(self, function: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype) -> Solution:
        """Return the equilibrium, `[B, N, D]`, with one residual per row.

        Args:
            function: A causal `AttentionMap` whose rows belong to keys.
            args: Its tensors.
            dtype: Dtype of the equilibrium.

        Raises:
            ValueError: If the map is not causal.
            NonFiniteError: If the map returns NaN or Inf.
        """
        system = self._system(function, args)
        if system.value_map is not None:
            engine = engines.feedback_engine(self.kernel, system)
            return feedback.Forward(system, engine, self.block).solution(dtype)
        forward = None
        with suppress(Unsettled):
            forward = _Forward(system, self, dtype).solved()
        if forward is None:  # outside the `with`, so that the first try's tensors are free by now
            forward = _Forward(system, self, dtype, cautious=True).solved()
        residual, size = forward.residual, forward.size
        return Solution(
            value=forward.y.flatten(-2).to(dtype),
            residual=residual,
            steps=forward.sweeps,
            converged=residual <= forward.atol + forward.rtol * size,
            abs_trace=residual[None],
            rel_trace=residual[None] / size.clamp_min(torch.finfo(size.dtype).tiny),
            evaluations=int(forward.sweeps.max()),
            memo=(forward.query.to(_dtype(function, args)), forward.lse, forward.inverse),
        )

    def adjoint(
        self,
        function: Callable[..., Tensor],
        args: tuple[Tensor, ...],
        y: Tensor,
        memo: tuple[Tensor, ...],
        grad: Tensor,
        needs: tuple[bool, ...],
    ) -> AdjointSolution:
        """Solve `lam = grad + J^T lam` at the equilibrium and return the gradients of the map's tensors.

        Args:
            function: As in `equilibrium`.
            args: As in `equilibrium`.
            y: The equilibrium, `[B, N, D]`.
            memo: The memo of `equilibrium`; empty if another solver found the equilibrium.
            grad: Cotangent, `[B, N, D]`.
            needs: For each of `args`, whether its gradient is needed.

        Returns:
            The gradients, and the residual of the adjoint equation.
        """
        system = self._system(function, args)
        found = None
        if system.value_map is not None:
            engine, named = engines.feedback_engine(self.kernel, system), dict(zip(system.tensors, needs, strict=True))
            at, heads = feedback.solved(system, y, memo), grad.view(*grad.shape[:2], system.heads, system.dim)
            found = feedback.Backward(system, engine, self.block, at, heads, named).solution()
        with suppress(Unsettled):
            found = _Backward(system, y, memo, grad, needs, self).solution() if found is None else found
        if found is None:
            found = _Backward(system, y, memo, grad, needs, self, cautious=True).solution()
        by_arg = [None if g is None else g.to(a.dtype) for g, a in zip(found.by_arg, args, strict=True)]
        return replace(found, by_arg=by_arg)

    def _system(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> CausalSystem:
        """The map's tensors, in float32 or wider where the C++ kernels, which know nothing narrower, compute it."""
        system = CausalSystem(_causal(function), args)
        return system.widened() if engines.chosen(self.kernel, system) == "cpp" else system

    def kernel_for(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> str:
        """Return what computes the diagonal blocks of a map: "torch", "cpp" or "triton".

        The compiled ones hand rows that they do not solve to torch.

        Args:
            function: As in `equilibrium`.
            args: As in `equilibrium`.

        Raises:
            ImportError: If a compiled one is asked for whose compiler is missing.
            ValueError: If one is asked for that cannot compute the map.
        """
        return engines.chosen(self.kernel, CausalSystem(_causal(function), args))

    def gains(
        self, function: Callable[..., Tensor], args: tuple[Tensor, ...], y: Tensor, memo: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the spectral radius of each row's diagonal block of dF/dy, `[B, N]`, without an attention pass.

        Their maximum is the spectral radius of dF/dy, which is block lower triangular.

        Args:
            function: As in `equilibrium`.
            args: As in `equilibrium`.
            y: The equilibrium, `[B, N, D]`.
            memo: The memo of `equilibrium`; empty if another solver found the equilibrium.
        """
        system = CausalSystem(_causal(function), args)
        at = _At(system, y, memo)
        if system.self_score is not None:
            return at.y.new_zeros(at.y.shape[:2])
        found = []
        for low in range(0, system.length, self.block):
            rows = slice(low, min(low + self.block, system.length))
            found.append(radius(own_jacobian(system, rows, at.y[:, rows], at.queries(rows), at.block(rows).p)))
        whole: Tensor = torch.cat(found, 1)
        return whole


def radius(matrix: Tensor) -> Tensor:
    """Return the spectral radius of matrices `[..., H, H]`, differentiable where the largest eigenvalue is simple."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0, 0].abs()
    try:
        largest: Tensor = torch.linalg.eigvals(matrix).abs().amax(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the eigenvalue solver failed for one matrix
        return gelfand_radius(matrix.flatten(0, -3)).view(matrix.shape[:-2])
    return largest


def _causal(function: Callable[..., Tensor]) -> AttentionMap:
    if not (isinstance(function, AttentionMap) and function.spec.is_causal and function.rows_are_keys):
        raise bad_value(
            "solver",
            'one that iterates on the whole map, unless is_causal=True and normalize_over="queries"',
            Came("ForwardSubstitution(...)"),
            'In this map rows depend on later rows, or on no other row. Use solver="auto" or Anderson().',
        )
    return function


def _dtype(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> torch.dtype:
    """The dtype of a map's keys, in which it keeps what it makes."""
    return args[_causal(function).names.index("key")].dtype


def _halves(low: int, high: int, block: int) -> int:
    """Where to cut a range: after half of its blocks, rounded up."""
    blocks = -(-(high - low) // block)
    return low + block * ((blocks + 1) // 2)


def _seen(system: CausalSystem, low: int, middle: int, high: int) -> tuple[slice, slice]:
    """The rows from `middle` on and the columns before it between which the window lets attention pass; maybe none."""
    window = system.spec.window
    if window is not None:
        high, low = min(high, middle + window - 1), max(low, middle - window + 1)
    return slice(middle, high), slice(low, middle)


def _sweeps(solver: ForwardSubstitution, system: CausalSystem) -> tuple[Any, int]:
    """The module that sweeps over blocks wider than the solver's, or None; and the rows of the first blocks."""
    sweeps = engines.sweeper(solver.kernel, system) if system.length > solver.block else None
    return sweeps, solver.block if sweeps is None else max(solver.block, sweeps.widest(system.length))


class _Forward:
    """The recursion. In rows that are not solved yet, `y` and `lse` hold attention over earlier, solved columns."""

    def __init__(
        self, system: CausalSystem, solver: ForwardSubstitution, dtype: torch.dtype, *, cautious: bool = False
    ) -> None:
        self.system, (self.rtol, self.atol) = system, solver.tolerances(dtype)
        new, shape = system.key.new_zeros, (system.batch, system.length)
        self.query = new(*shape, system.groups, system.dim)
        normed = system.function.query_map.normalize
        self.inverse = new(*shape, system.groups, 1, dtype=system.wide) if normed else new(0)
        self.residual, self.size = new(*shape, dtype=system.wide), new(*shape, dtype=system.wide)
        self.sweeps = new(*shape, dtype=torch.long)
        if system.past:
            assert system.past_column is not None and system.past_value is not None
            out, self.lse = system.below(slice(0, system.length), system.past_column, system.past_value, 0)
            self.y, self.lse = out.to(system.wide).transpose(1, 2).contiguous(), self.lse.contiguous()
        else:
            self.y = new(*shape, system.heads, system.dim, dtype=system.wide)
            self.lse = new(system.batch, system.heads, system.length, dtype=system.wide).fill_(-torch.inf)
        engine = engines.engine(solver.kernel, system)
        self.block = min(solver.block, system.length)
        sweeps, self.widest = _sweeps(solver, system)
        self.compiled: engines.ForwardKernel | None = None
        into = {n: getattr(self, n) for n in ("y", "query", "inverse", "lse", "residual", "size", "sweeps")}
        if engine is not None:
            self.compiled = engine.ForwardKernel(system, into, self.block, self.rtol, self.atol)
            self.widest = max(self.widest, engine.widest(system, self.block))
        self.swept: engines.ForwardSweeper | None = None
        if sweeps is not None:
            self.swept = sweeps.ForwardSweeps(system, into, self.widest, self.rtol, self.atol, cautious=cautious)
        kernel: Any = self.compiled
        self.merger: engines.Merger | None = kernel if isinstance(kernel, engines.Merger) else None

    def solved(self) -> "_Forward":
        """Solve all rows."""
        self.descend(0, self.system.length, self.widest)
        if self.swept is not None:
            self.swept.check()
        return self

    def descend(self, low: int, high: int, block: int) -> None:
        if high - low <= block:
            self._settle(slice(low, high))
            return
        # The earlier half first: only then are the queries of its columns known, to which the later half attends.
        middle = _halves(low, high, block)
        self.descend(low, middle, block)
        self._attend(*_seen(self.system, low, middle, high))
        self.descend(middle, high, block)

    def _merge(self, rows: slice, query: Tensor, value: Tensor, first: int) -> None:
        out, lse = self.system.below(rows, query, value, first)
        if self.merger is not None:
            self.merger.merge(rows, out, lse)
            return
        before = self.lse[:, :, rows]
        total = torch.logaddexp(before, lse)
        # A finite total: rows that have seen no column get a share exp(-inf) = 0, not NaN.
        share = torch.exp(lse - total.clamp_min(torch.finfo(total.dtype).min))[..., None]
        y = self.y[:, rows].transpose(1, 2)
        y.lerp_(out.to(self.system.wide), share)
        before.copy_(total)

    def _settle(self, rows: slice) -> None:
        n = rows.stop - rows.start
        if self.swept is not None and n > self.block:
            if not self.swept.settle(rows):  # a block that sweeps do not settle is unchanged, and is halved
                self.descend(rows.start, rows.stop, max(self.block, (n + 1) // 2))
            return
        if self.swept is not None:  # these rows attend to the last swept block: it has to have settled
            self.swept.check()
        if self.compiled is None:
            self._settle_eagerly(rows)
            return
        while rows.start < rows.stop:
            done = self.compiled.settle(rows)
            hard = slice(done, min(done + HANDED_OVER, rows.stop))  # the kernel gave up here: these rows go to torch
            self._attend(slice(done, rows.stop), slice(rows.start, done))
            self._settle_eagerly(hard)
            rows = slice(hard.stop, rows.stop)
            self._attend(rows, hard)

    def _attend(self, rows: slice, cols: slice) -> None:
        if cols.start < cols.stop and rows.start < rows.stop:
            query, value = self.query[:, cols].transpose(1, 2), self.system.value[:, :, cols]
            self._merge(rows, query, value, self.system.past + cols.start)

    def _settle_eagerly(self, rows: slice) -> None:
        n = rows.stop - rows.start
        if n == 0:
            return
        before, lse = self.y[:, rows].transpose(1, 2), self.lse[:, :, rows]
        found = BlockSolver(self.system, rows, before, lse).settle(self.rtol, self.atol)
        if not found.settled and n > 1:
            compiled, self.compiled = self.compiled, None  # a hard block stays in torch
            self.descend(rows.start, rows.stop, (n + 1) // 2)
            self.compiled = compiled
            return
        self.y[:, rows], self.query[:, rows], self.lse[:, :, rows] = found.y, found.queries.query, found.lse
        if found.queries.inverse is not None:
            self.inverse[:, rows] = found.queries.inverse
        self.residual[:, rows], self.size[:, rows], self.sweeps[:, rows] = found.residual, found.size, found.sweeps


class _At:
    """A known equilibrium: outputs, queries, log-sum-exp."""

    def __init__(self, system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...]) -> None:
        self.system = system
        self.given = y.view(*y.shape[:2], system.heads, system.dim)  # in its own dtype, as the flash kernels take it
        self.y = self.given.to(system.wide)
        self.normed = y.new_zeros(0)
        if memo and system.norm_weight is None:
            self.query, self.lse, self.inverse = memo[0].to(system.narrow), *memo[1:]
            return
        everything = slice(0, system.length)
        made = system.phi(self.y, everything)
        self.normed = self.normed if made.normed is None else made.normed
        if memo:
            self.query, self.lse, self.inverse = memo[0].to(system.narrow), *memo[1:]
            return
        self.query = made.query.to(system.narrow)
        self.inverse = y.new_zeros(0) if made.inverse is None else made.inverse
        self.lse = system.whole_lse(self.query.transpose(1, 2))

    def queries(self, rows: slice) -> Queries:
        inverse = self.inverse[:, rows] if self.inverse.numel() else None
        normed = self.normed[:, rows] if self.normed.numel() else None
        return Queries(self.query[:, rows].to(self.system.wide), inverse, normed)

    def block(self, rows: slice) -> BlockAdjointSolver:
        return BlockAdjointSolver(self.system, rows, self.y[:, rows], self.queries(rows), self.lse[:, :, rows])


class _Backward:
    """The recursion of the adjoint, from the last block to the first.

    In rows that are not solved yet, `d_query` holds the cotangents of the queries from solved rows. `lam` may share its
    memory: a row needs its `d_query` no longer when its `lam` is stored.
    """

    def __init__(
        self, system: CausalSystem, y: Tensor, memo: tuple[Tensor, ...], grad: Tensor, needs: tuple[bool, ...],
        solver: ForwardSubstitution, *, cautious: bool = False,
    ) -> None:  # fmt: skip
        self.system, self.at = system, _At(system, y, memo)
        self.grad, self.rtol = grad.reshape(self.at.y.shape), solver.tolerances(y.dtype, linear=True)[0]
        self.needs = dict(zip(system.function.names, needs, strict=True))
        self.allowed = self.rtol * largest(grad).to(system.wide)
        self.bias_grad = any(need for name, need in self.needs.items() if name.startswith("term"))
        new, shape = torch.zeros, (system.batch, system.length)
        where: dict[str, Any] = {"dtype": system.wide, "device": y.device}
        self.d_query = new(*shape, system.groups, system.dim, **where)
        self.lam = self.d_query if system.groups == system.heads else new(*self.grad.shape, **where)
        self.d_key = new(system.key.shape, **where)
        self.d_value = new(system.value.shape, **where)
        parts = {n: t for n, t in system.tensors.items() if n in ("weight", "bias", "added", "self_score")}
        self.rest = {n: new(t.shape, **where) for n, t in parts.items() if self.needs[n]}
        self.d_terms: list[Tensor | None] = [None] * len(system.terms)
        self.residual = new(system.batch, **where)
        self.converged = torch.ones_like(self.residual, dtype=torch.bool)
        self.sweeps, self.near_singular = 0, 0
        engine = engines.engine(solver.kernel, system)
        self.compiled: engines.AdjointKernel | None = None
        at = {"y": self.at.y, "query": self.at.query, "inverse": self.at.inverse, "lse": self.at.lse}
        at |= {"normed": self.at.normed} if self.at.normed.numel() else {}
        self.block = self.widest = min(solver.block, system.length)
        if engine is not None and (engine.KEEPS_SLOPES or not self.bias_grad):
            self.compiled = engine.AdjointKernel(
                system, at, self.grad, self.d_query, self.allowed, self.block, slopes=self.bias_grad
            )
        self.swept: engines.AdjointSweeper | None = None
        self.made: Tensor | None = None
        sweeps = None
        if engine is not None and self.compiled is not None:
            sweeps, self.widest = _sweeps(solver, system)
            self.widest = max(self.widest, engine.widest(system, self.block))
        if sweeps is not None:
            self.made = system.key.new_empty(*shape, system.groups * system.dim)
            into = {"later": self.d_query, "lam": self.lam, "d_key": self.d_key, "d_value": self.d_value,
                    "made": self.made, "own": self.rest.get("self_score")}  # fmt: skip
            at |= {"y": self.at.given}
            self.swept = sweeps.AdjointSweeps(
                system, at, self.grad, into, self.allowed, self.rtol, self.widest, cautious=cautious
            )

    def descend(self, low: int, high: int, block: int) -> None:
        if high - low <= block:
            self._solve(slice(low, high))
            return
        # The later half first: its solved rows send cotangents to the queries of the earlier half.
        middle = _halves(low, high, block)
        self.descend(middle, high, block)
        rows, cols = _seen(self.system, low, middle, high)
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
