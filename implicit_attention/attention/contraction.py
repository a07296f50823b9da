"""The solver of maps that contract by a known rate: plain iteration, each step one attention pass and one product.

A layer with `max_gain=c` makes such a map (`gain`). Plain iteration then arrives from anywhere, and so does that of its
adjoint: every step shrinks the distance to the solution by c at least, in practice by far more: c is a worst case.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention import chunked
from implicit_attention.attention.gain import ROUNDINGS, predicted_steps
from implicit_attention.attention.map import AttentionMap, for_heads, merge_heads, split_heads
from implicit_attention.attention.operation import partial_backward, stock
from implicit_attention.attention.positions import rotate, unrotate
from implicit_attention.equilibrium.maps import Linearization
from implicit_attention.equilibrium.solvers import Anderson, DirectSolver, Solution, Solver
from implicit_attention.equilibrium.solvers.solution import AdjointSolution
from implicit_attention.errors import NOT_FINITE, Came, NonFiniteError, bad_type, bad_value, check_positive

_TOLERANCES = {torch.float64: 1e-10}
_ROUNDINGS = 2 * ROUNDINGS  # of two passes: a residual is their difference
_TOLERANCE = 5e-2  # of the others; `Contraction` says what it means
_NEARER = 0.2  # of the tolerance: how near to the equilibrium a value has to be, by the rate of the last two steps


@dataclass(frozen=True, kw_only=True)
class Contraction(DirectSolver):
    r"""`y <- F(y)` from zero, or from the start that the call gives, for layers with `max_gain`.

    It returns the image of an iterate. That iterate's residual is within `rtol max|F(y)| + atol`, and the image is
    within a fifth of that of the equilibrium, as far as the last two steps tell: by their rate r, it is at most
    `r / (1 - r)` residuals away. Mostly r is 0.03. After one step from a given start only the residual counts.
    The reported residual is that of the iterate. The adjoint stops where its solution is within `rtol` of the
    cotangent, told in the same way. Both allow for rounding. Defaults: 1e-10 in float64, 5e-2 in others; `atol` 0. The
    study "contraction" found no difference in accuracy between 1e-1 and 1e-4.

    Attributes:
        steps: Take exactly so many steps, forward and backward, and read nothing on the host: for CUDA graphs and
            programs of a fixed cost. The residual is reported as always. None: stop at the tolerance.
        fallback: Iterative solver for derived equations: second derivatives, or adjoints under torch.func transforms.

    Reference:
        Banach (1922) for the rate. Ortega and Rheinboldt, "Iterative Solution of Nonlinear Equations" (1970), 12.1.
    """

    steps: int | None = None
    fallback: Solver = field(default_factory=Anderson)

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if self.steps is not None:
            check_positive("steps", self.steps, integer=True)
            if self.steps < 2:
                raise bad_value("steps", "at least 2", self.steps, "The first step is attention without Omega_Q.")
        if not isinstance(self.fallback, Solver):
            raise bad_type("fallback", "an iterative solver such as Anderson()", self.fallback)

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        if self.steps is not None:
            return f"Raise steps (it is {self.steps}), or leave it None to stop at the tolerance."
        return "Raise the tolerances (Contraction(rtol=..., atol=...)) or compute in a wider dtype."

    def tolerances(self, dtype: torch.dtype, *, linear: bool = False) -> tuple[float, float]:
        """Return the relative and the absolute tolerance for a dtype; arguments as in `Method.tolerances`."""
        rtol = _TOLERANCES.get(dtype, _TOLERANCE) if self.rtol is None else self.rtol
        return rtol, 0.0 if self.atol is None else self.atol

    def equilibrium(self, function: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype) -> Solution:
        """Return the equilibrium, `[B, N, D]`.

        Args:
            function: An `AttentionMap` with `max_gain`.
            args: Its tensors.
            dtype: Dtype of the equilibrium.

        Raises:
            ValueError: If the map has no `max_gain`.
            NonFiniteError: If it returns NaN or Inf.
        """
        passes = _Passes(_contracting(function), args)
        rtol, atol = self.tolerances(dtype)
        first, y = (2, passes.from_zero()) if passes.start is None else (1, passes.start.clone())
        at, size, rounding = y, passes.size(y), passes.rounding()
        done, steps = torch.zeros_like(size, dtype=torch.bool), torch.zeros_like(size, dtype=torch.long)
        before = size if passes.start is None else None  # the length of the last step: the first goes from zero
        for count in range(first, (self.steps or passes.most()) + 1):
            at = y if self.steps or count == first else torch.where(passes.by_system(done), at, y)
            query, y, lse = passes.forward(at)
            residual, size = passes.size(y - at), passes.size(y)
            allowed = atol + rtol * size
            if before is not None:
                rate = passes.rate(residual, before)
                allowed *= (_NEARER * (1.0 - rate) / rate).clamp_max(1.0)
            allowed += rounding
            steps, done = torch.where(done, steps, count), done | (residual <= allowed)
            if self.steps is None and _settled((residual - allowed).masked_fill(done, 0.0)):
                break
            before = residual
        size = size.clamp_min(torch.finfo(residual.dtype).tiny)
        return Solution(
            value=y.to(dtype),
            residual=residual,
            steps=steps,
            converged=done,
            abs_trace=residual[None],
            rel_trace=(residual / size)[None],
            evaluations=count,
            memo=(at, query, lse),
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
        """Solve `lam = grad + J^T lam`; return the gradients of the map's tensors. Arguments as in the base class."""
        passes = _Passes(_contracting(function), args)
        at, query, lse = memo or (y, *passes.forward(y)[::2])
        y = y.to(query.dtype)
        rtol = self.tolerances(y.dtype, linear=True)[0] + _ROUNDINGS * torch.finfo(y.dtype).eps
        lam = grad = grad.to(query.dtype)
        before = wanted = passes.size(grad)
        done, count = torch.zeros_like(before, dtype=torch.bool), 0
        while count < (self.steps or passes.most(rtol)):
            count += 1
            pull = passes.backward(lam, query, y, lse)
            following = grad + pull.output
            residual = passes.size(following - lam)
            allowed = rtol * wanted * (1.0 - passes.rate(residual, before))
            done, before = done | (residual <= allowed), residual
            # Where a product overflows, the gradient is not finite, and a GradScaler leaves the step out.
            if self.steps is None and not bool((~done & residual.isfinite()).any()):
                break
            lam = following if self.steps else torch.where(passes.by_system(done), lam, following)
        by_arg = passes.gradients(pull, at, query, y, lse, needs)
        return AdjointSolution(by_arg, residual, done, count)

    def per_sample(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """Return, for each of the map's tensors, whether its first dimension counts samples."""
        return _contracting(function).per_sample(args)


class _Pull(NamedTuple):
    """Products of a cotangent with the transposed derivatives of F.

    Attributes:
        lam: The cotangent, `[B, N, D]`.
        made: With respect to the queries before their rotation, `[B, N, G d]`.
        output: With respect to the output, `[B, N, D]`.
        key: With respect to the keys of all heads, `[B, H, M, d]`.
        value: With respect to the values of all heads, `[B, H, M, d]`.
    """

    lam: Tensor
    made: Tensor
    output: Tensor
    key: Tensor
    value: Tensor


class _Passes:
    """F and its products, in the layout of the kernels: heads are views, and nothing is computed twice."""

    def __init__(self, function: AttentionMap, args: tuple[Tensor, ...]) -> None:
        self.function, self.args = function, args
        self.t = t = dict(zip(function.names, args, strict=True))
        self.gate, self.weight = t["gate"].to(t["key"].dtype), t["weight"]
        self.made_heads, dim = function.query_map.num_heads, t["key"].shape[-1]
        self.heads = self.weight.shape[1] // dim
        self.key, self.value = for_heads(t["key"], self.heads), for_heads(t["value"], self.heads)
        parts = [t[name] for name in ("added", "bias") if name in t]
        self.base = sum(parts[1:], parts[0]) if parts else None  # what queries are made of besides y
        self.terms = tuple(t[f"term{i}"] for i in range(len(function.spec.terms)))
        self.seeds = t.get("seeds")
        start = t.get("start")
        self.start = None if start is None else start.to(self.value.dtype)
        self.tokens = t["key"].shape[-2] if function.rows_are_keys else t["added"].shape[1]

    def from_zero(self) -> Tensor:
        """Return F(0), `[B, N, D]`: attention whose queries are made of the input alone."""
        base = self.key.new_zeros(1) if self.base is None else self.base
        made = base.expand(len(self.gate), self.tokens, len(self.weight))
        return self._attend(self._split(made))[0]

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries `[B, G, N, d]`, F(y) `[B, N, D]`, and the log-sum-exp `[B, H, N]`."""
        made = F.linear(y, self.weight)
        made = self.gate * made if self.base is None else torch.addcmul(self.base, self.gate, made)
        query = self._split(made)
        return query, *self._attend(query)

    def backward(self, lam: Tensor, query: Tensor, y: Tensor, lse: Tensor) -> _Pull:
        """Return the products with `lam` at queries whose attention is `y`."""
        found = self._partial(lam, query, y, lse)
        made, key = (found[1], found[0]) if self.function.rows_are_keys else found[:2]
        made = _summed(made, self.made_heads)
        made = merge_heads(unrotate(made, self.t["rotation"]) if "rotation" in self.t else made)
        # The factor first: in half precision the product with the weights could overflow without it.
        return _Pull(lam, made, (self.gate * made) @ self.weight, key, found[2])

    def gradients(
        self, pull: _Pull, at: Tensor, query: Tensor, y: Tensor, lse: Tensor, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradient of each tensor of the map, None if it is not needed."""
        if self._needed("rotation", needs):  # angles that are learned
            return Linearization(self.function, at, self.args, needs).vjp(pull.lam)[1]
        t = self.t
        found: dict[str, Tensor | None] = {
            "key": _summed(pull.key, t["key"].shape[1]),
            "value": _summed(pull.value, t["value"].shape[1]),
            "weight": pull.made.flatten(0, 1).mT @ (self.gate * at).flatten(0, 1),
            "added": pull.made,
        }
        if self._needed("bias", needs):
            found["bias"] = pull.made.sum((0, 1))
        if self._needed("gate", needs):
            gate = t["gate"].clamp_min(torch.finfo(t["gate"].dtype).tiny)
            found["gate"] = (pull.output.to(gate.dtype) * at).sum_to_size(gate.shape) / gate
        if any(self._needed(f"term{i}", needs) for i in range(len(self.terms))):
            terms = self._partial(pull.lam, query, y, lse, bias_grad=True)[3:]
            found |= {f"term{i}": g for i, g in enumerate(terms)}
        named = zip(self.function.names, self.args, needs, strict=True)
        by_arg = [found.get(name) if need else None for name, _, need in named]
        return [None if g is None else g.to(a.dtype) for g, a in zip(by_arg, self.args, strict=True)]

    def size(self, t: Tensor) -> Tensor:
        """Return the largest magnitude of each system of `[B, N, D]`, in float32 or wider."""
        found = t.abs().amax((1, 2) if self.function.rows_are_keys else 2)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def by_system(self, done: Tensor) -> Tensor:
        """Return a mask of systems as one that fits `[B, N, D]`."""
        return done[:, None, None] if self.function.rows_are_keys else done[..., None]

    def rounding(self) -> Tensor:
        """Return the rounding of an attention pass over the values, of the shape of `size` or one that fits it."""
        largest = _ROUNDINGS * torch.finfo(self.value.dtype).eps * self.t["value"].abs().amax((1, 2, 3))
        return largest if self.function.rows_are_keys else largest[:, None]

    def rate(self, length: Tensor, before: Tensor) -> Tensor:
        """Return how much shorter a step is than the one before, at most the worst case."""
        assert self.function.max_gain is not None
        tiny = torch.finfo(length.dtype).tiny
        return (length / before.clamp_min(tiny)).clamp(tiny, self.function.max_gain)

    def most(self, rtol: float | None = None) -> int:
        """Return how many steps the worst case takes: from the size of the values, or of a cotangent, to rounding."""
        assert self.function.max_gain is not None
        rounding = _ROUNDINGS * torch.finfo(self.value.dtype).eps
        # The norm in which F contracts, or its dual, is at most so much larger than the largest component.
        norm = math.sqrt(self.weight.shape[1])
        if rtol is None:
            return 1 + predicted_steps(self.function.max_gain, rounding / (2 * norm))
        tokens = self.tokens if self.function.rows_are_keys else 1
        return 1 + predicted_steps(self.function.max_gain, rtol / (norm * tokens))

    def _split(self, made: Tensor) -> Tensor:
        query = split_heads(made, self.made_heads)
        return rotate(query, self.t["rotation"]) if "rotation" in self.t else query

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self._sides(query)
        kernel, inputs = stock(rows, self.value, self.function.spec), (rows, columns, self.value, None, *self.terms)
        if kernel is None:
            out, lse = chunked.forward(self.function.spec, self.seeds, inputs)
        else:
            out, lse = kernel.forward(self.function.spec, inputs)
        return merge_heads(out), lse

    def _partial(
        self, lam: Tensor, query: Tensor, y: Tensor, lse: Tensor, *, bias_grad: bool = False
    ) -> tuple[Tensor, ...]:
        lam, y = split_heads(lam, self.heads), split_heads(y, self.heads)
        found: Any = partial_backward(
            lam, *self._sides(query), self.value, y, lse, self.function.spec, seeds=self.seeds, terms=self.terms,
            bias_grad=bias_grad,
        )  # fmt: skip
        return found  # type: ignore[no-any-return]

    def _sides(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the scores."""
        query = for_heads(query, self.heads)
        return (self.key, query) if self.function.rows_are_keys else (query, self.key)

    def _needed(self, name: str, needs: tuple[bool, ...]) -> bool:
        return name in self.t and needs[self.function.names.index(name)]


def _contracting(function: Callable[..., Tensor]) -> AttentionMap:
    if not (isinstance(function, AttentionMap) and function.max_gain is not None):
        raise bad_value(
            "solver", "one for maps of any kind", Came("Contraction(...)"),
            "This map does not contract by a known rate: make the layer with max_gain=0.9, or use Anderson().",
        )  # fmt: skip
    return function


def _settled(excess: Tensor) -> bool:
    """Whether no system is above tolerance: the only number that the host reads."""
    most = float(excess.amax())
    if not math.isfinite(most):
        raise NonFiniteError(NOT_FINITE)
    return most <= 0


def _summed(t: Tensor, heads: int) -> Tensor:
    """`[B, H, N, d] -> [B, G, N, d]`: add up what a group's heads give."""
    return t if t.shape[1] == heads else t.view(len(t), heads, -1, *t.shape[2:]).sum(2)
