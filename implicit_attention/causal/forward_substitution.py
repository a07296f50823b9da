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
from implicit_attention.causal.backward_substitution import Backward, Equilibrium
from implicit_attention.causal.diagonal import BlockSolver, Unsettled
from implicit_attention.causal.own_columns import own_jacobian
from implicit_attention.causal.row_problem import gelfand_radius
from implicit_attention.causal.system import CausalSystem, halves, merge
from implicit_attention.equilibrium.solvers import NewtonKrylov, Solution, Solver
from implicit_attention.equilibrium.solvers.base import DirectSolver
from implicit_attention.equilibrium.solvers.solution import AdjointSolution
from implicit_attention.equilibrium.triton_available import launching_on
from implicit_attention.errors import Came, bad_type, bad_value, check_choice, check_positive

# Rows that go to torch together when a compiled kernel gives up on the first of them. More rows share torch's launch
# overhead, but some of them the kernel could have solved.
HANDED_OVER = 4


@dataclass(frozen=True, kw_only=True)
class ForwardSubstitution(DirectSolver):
    """The solver of causal maps, block by block: about one attention pass plus the diagonal blocks.

    It solves them for nearly any weights. Rows that it cannot solve are reported.

    Attributes:
        block: Most rows of a diagonal block in torch. On a CPU a large batch gets smaller ones, down to 16 rows. A
            block that does not settle is halved, down to single rows. Compiled kernels take wider blocks.
        kernel: What computes the diagonal blocks. "auto" takes the C++ kernels on a CPU, Triton's on a CUDA device
            where they pass a self-test, and torch elsewhere. "cpp" is the C++ kernels, part of the package. "triton"
            (the extra `gpu`) is for CUDA devices, without dropout. "torch" serves everywhere, several times slower.
            See `kernel_for`.
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
        with launching_on(args[0].device):
            return self._equilibrium(function, args, dtype)

    def _equilibrium(self, function: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype) -> Solution:
        system, kernel = self._prepared(function, args)
        if system.value_map is not None:
            found = feedback.Forward(system, engines.feedback_engine(kernel), self.block).solution(dtype)
            return replace(found, memo=(found.memo[0].to(_dtype(function, args)), *found.memo[1:]))
        forward = None
        with suppress(Unsettled):
            forward = _Forward(system, self, kernel, dtype).solved()
        if forward is None:  # outside the `with`, so that the first try's tensors are free by now
            forward = _Forward(system, self, kernel, dtype, cautious=True).solved()
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
        with launching_on(args[0].device):
            system, kernel = self._prepared(function, args)
            if system.value_map is not None:
                engine = engines.feedback_engine(kernel)
                found = feedback.Backward(system, engine, self.block, y, memo, grad, needs).solution()
            else:
                found = self._adjoint(kernel, system, y, memo, grad, needs)
        by_arg = [None if g is None else g.to(a.dtype) for g, a in zip(found.by_arg, args, strict=True)]
        return replace(found, by_arg=by_arg)

    def per_sample(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """Return, for each of the map's tensors, whether its first dimension counts samples.

        Args:
            function: As in `equilibrium`.
            args: As in `equilibrium`.

        Returns:
            A flag for each tensor.
        """
        return _causal(function).per_sample(args)

    def _adjoint(self, kernel: str, system: CausalSystem, y: Tensor, *given: Any) -> AdjointSolution:
        """The adjoint of a map whose values read no outputs; again, with caution, if a trusted block did not settle."""
        told: dict[str, Any] = {"kernel": kernel, "block": self.block}
        told["rtol"] = self.tolerances(y.dtype, linear=True)[0]
        with suppress(Unsettled):
            return Backward(system, y, *given, **told).solution()
        return Backward(system, y, *given, **told, cautious=True).solution()

    def _prepared(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[CausalSystem, str]:
        """The map's tensors, and the engine. The C++ kernels know nothing narrower than float32."""
        system = CausalSystem(_causal(function), args)
        kernel = engines.chosen(self.kernel, system, solved_with)
        return system.widened() if kernel == "cpp" else system, kernel

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
        return engines.chosen(self.kernel, CausalSystem(_causal(function), args), solved_with)

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
        if not y.numel():
            return y.new_zeros(y.shape[:2], dtype=system.wide)
        at = Equilibrium(system, y, memo)
        if system.self_score is not None:
            return at.y.new_zeros(at.y.shape[:2])
        found = []
        for low in range(0, system.length, self.block):
            rows = slice(low, min(low + self.block, system.length))
            found.append(radius(own_jacobian(system, rows, at.y[:, rows], at.queries(rows), at.block(rows).p)))
        whole: Tensor = torch.cat(found, 1)
        return whole


def solved_with(kernel: str, function: AttentionMap, args: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Return what `self_test` compares: the equilibrium, its last row as decoding finds it, and the tensors' gradients.

    Args:
        kernel: The engine.
        function: The map.
        args: Its tensors.
        grad: Cotangent of the equilibrium, `[B, N, D]`.
    """
    solver = ForwardSubstitution(kernel=kernel)
    found = solver.equilibrium(function, args, grad.dtype)
    tokens, last = engines.token_module(kernel), found.value[:, -1:]
    if tokens is not None:
        with launching_on(grad.device):
            last = tokens.last_row(CausalSystem(_causal(function), args), found.memo[0], solver.tolerances(grad.dtype))
    back = solver.adjoint(function, args, found.value, found.memo, grad, (True,) * len(args))
    return [found.value, last, *(g for g in back.by_arg if g is not None)]


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


class _Forward:
    """The recursion. In rows that are not solved yet, `y` and `lse` hold attention over earlier, solved columns."""

    def __init__(
        self, system: CausalSystem, solver: ForwardSubstitution, kernel: str, dtype: torch.dtype, *,
        cautious: bool = False,
    ) -> None:  # fmt: skip
        self.system, (self.rtol, self.atol) = system, solver.tolerances(dtype)
        new, shape = system.key.new_zeros, (system.batch, system.length)
        self.query = system.key.new_empty(*shape, system.groups, system.dim)
        normed = system.function.query_map.normalize
        self.inverse = system.key.new_empty(*shape, system.groups, 1, dtype=system.wide) if normed else new(0)
        self.residual, self.size = new(*shape, dtype=system.wide), new(*shape, dtype=system.wide)
        self.sweeps = new(*shape, dtype=torch.long)
        if system.past:
            assert system.past_column is not None and system.past_value is not None
            out, self.lse = system.below(slice(0, system.length), system.past_column, system.past_value, 0)
            self.y, self.lse = out.to(system.wide).transpose(1, 2).contiguous(), self.lse.contiguous()
        else:
            self.y = new(*shape, system.heads, system.dim, dtype=system.wide)
            self.lse = new(system.batch, system.heads, system.length, dtype=system.wide).fill_(-torch.inf)
        into = {n: getattr(self, n) for n in ("y", "query", "inverse", "lse", "residual", "size", "sweeps")}
        self.block = engines.rows_of_block(kernel, system, solver.block)
        sweeps, self.widest = engines.sweeper(kernel, system, self.block)
        self.kernel: engines.ForwardKernel | None = None
        self.sweeper: engines.ForwardSweeper | None = None
        engine = engines.engine(kernel)
        if engine is not None:
            self.kernel = engine.ForwardKernel(system, into, self.block, self.rtol, self.atol)
            self.widest = max(self.widest, engine.widest(system, self.block))
        if sweeps is not None:
            self.sweeper = sweeps.ForwardSweeps(system, into, self.widest, self.rtol, self.atol, cautious=cautious)
        self.merger: engines.Merger | None = self.kernel if isinstance(self.kernel, engines.Merger) else None

    def solved(self) -> "_Forward":
        """Solve all rows."""
        self.descend(0, self.system.length, self.widest)
        if self.sweeper is not None:
            self.sweeper.check()
        return self

    def descend(self, low: int, high: int, block: int) -> None:
        """Solve some rows, in blocks of at most so many."""
        if high - low <= block:
            self._settle(slice(low, high))
            return
        # The earlier half first: only then are the queries of its columns known, to which the later half attends.
        middle = halves(low, high, block)
        self.descend(low, middle, block)
        self._attend(*self.system.seen(low, middle, high))
        self.descend(middle, high, block)

    def _attend(self, rows: slice, cols: slice) -> None:
        """Attend unsolved rows to solved columns, and merge the result into their state."""
        if cols.start >= cols.stop or rows.start >= rows.stop:
            return
        query, value = self.query[:, cols].transpose(1, 2), self.system.value[:, :, cols]
        out, lse = self.system.below(rows, query, value, self.system.past + cols.start)
        if self.merger is not None:
            self.merger.merge(rows, out, lse)
        else:
            merge(self.y[:, rows].transpose(1, 2), self.lse[:, :, rows], out.to(self.system.wide), lse)

    def _settle(self, rows: slice) -> None:
        """Settle a block: by sweeps if it has many rows, else by the engine's kernel, else in torch."""
        n = rows.stop - rows.start
        if self.sweeper is not None and n > self.block:
            if not self.sweeper.settle(rows):  # a block that sweeps do not settle is unchanged, and is halved
                self.descend(rows.start, rows.stop, max(self.block, (n + 1) // 2))
            return
        if self.sweeper is not None:  # these rows attend to the last swept block: it has to have settled
            self.sweeper.check()
        if self.kernel is None:
            self._settle_in_torch(rows)
        else:
            self._settle_by_kernel(self.kernel, rows)

    def _settle_by_kernel(self, kernel: engines.ForwardKernel, rows: slice) -> None:
        """Settle a block by a kernel. Where it gives up, torch settles a few rows and the kernel goes on."""
        while rows.start < rows.stop:
            done = kernel.settle(rows)
            hard = slice(done, min(done + HANDED_OVER, rows.stop))
            self._attend(slice(done, rows.stop), slice(rows.start, done))
            self._settle_in_torch(hard)
            rows = slice(hard.stop, rows.stop)
            self._attend(rows, hard)

    def _settle_in_torch(self, rows: slice) -> None:
        """Settle a block in torch; if it does not settle, each half alone."""
        n = rows.stop - rows.start
        if n == 0:
            return
        before, lse = self.y[:, rows], self.lse[:, :, rows]
        found = BlockSolver(self.system, rows, before, lse).settle(self.rtol, self.atol)
        if not found.settled and n > 1:
            kernel, self.kernel = self.kernel, None  # a hard block stays in torch
            self.descend(rows.start, rows.stop, (n + 1) // 2)
            self.kernel = kernel
            return
        self.y[:, rows], self.query[:, rows], self.lse[:, :, rows] = found.y, found.queries.query, found.lse
        if found.queries.inverse is not None:
            self.inverse[:, rows] = found.queries.inverse
        self.residual[:, rows], self.size[:, rows], self.sweeps[:, rows] = found.residual, found.size, found.sweeps
