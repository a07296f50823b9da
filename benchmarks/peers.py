"""Who is measured: this library's engine, and what else one could take for the same equation.

Everybody gets keys and values that are already projected; what makes queries from the output (`Omega_Q`, then RMS
norm) is part of the work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference import NORM_EPS, CausalMap
from implicit_attention import ImplicitQueryAttention, Solution
from implicit_attention.attention.map import AttentionMap
from implicit_attention.equilibrium.adjoints import Implicit
from implicit_attention.equilibrium.problem import Problem
from implicit_attention.equilibrium.solvers.base import Method
from implicit_attention.equilibrium.solvers.solution import AdjointSolution

ITERATIONS = 10  # of those who take a fixed number, as the seed does
MAX_STEPS = 100  # of torchdeq's solvers
NEAR_SINGULAR = "near-singular gradient"  # rows whose gain is within 1e-3 of 1


@dataclass(frozen=True)
class Case:
    """One equation, with given keys and values.

    Attributes:
        layer: Where it comes from.
        function: The layer's map.
        tensors: The map's tensors by name, detached.
        start: y = V, `[B, N, D]`.
        cotangent: Random, like the output.
    """

    layer: ImplicitQueryAttention
    function: AttentionMap
    tensors: dict[str, Tensor]
    start: Tensor
    cotangent: Tensor

    @classmethod
    def of(cls, layer: ImplicitQueryAttention, x: Tensor) -> "Case":
        with torch.no_grad():
            equation = layer.equation(x)
        tensors = dict(zip(equation.function.names, (t.detach() for t in equation.args), strict=True))
        return cls(layer, equation.function, tensors, equation.start, torch.randn_like(equation.start))

    @property
    def map(self) -> CausalMap:
        return CausalMap(self.layer.scale, self.layer.qk_norm)

    def leaves(self, *names: str) -> dict[str, Tensor]:
        return {name: self.tensors[name].detach().requires_grad_() for name in names}


@dataclass(frozen=True)
class Entrant:
    """A contestant in front of one case: `attend(*leaves.values())` returns the output, `[B, N, D]`.

    Attributes:
        failures: What it reported as not solved (equilibrium, adjoint equation) or as rows of untrustworthy gradient,
            with their number; filled as it runs.
    """

    case: Case
    leaves: dict[str, Tensor]
    attend: Callable[..., Tensor]
    failures: dict[str, int] = field(default_factory=dict)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(*self.leaves.values())

    def forward_backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.attend(*self.leaves.values())
        gradients = torch.autograd.grad(y, list(self.leaves.values()), self.case.cotangent)
        return y.detach(), dict(zip(self.leaves, gradients, strict=True))


@dataclass(frozen=True)
class Contestant:
    """Somebody to measure.

    Attributes:
        label: What the reader is told.
        enter: Prepares it for a case, with a tolerance.
        settles: Whether it iterates until a tolerance is met, and has an implicit gradient; otherwise its output
            and gradients are those of a fixed recipe.
        self_query: The layer's option.
        longest: The longest sequence it is given.
        why: The reason for that.
    """

    label: str
    enter: Callable[[Case, float], Entrant]
    settles: bool = False
    self_query: str = "output"
    longest: int | None = None
    why: str = ""


class Failures:
    """Counts what a layer would warn of, the worst of all solves: rows, or samples of an adjoint equation."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __call__(self, solution: Solution, name: str, solver: Method) -> None:
        del solver
        self._count(name, int((~solution.converged).sum()))

    def adjoint(self, found: AdjointSolution, grad: Tensor, solver: Method) -> None:
        del grad, solver
        self._count("adjoint equation", int((~found.converged).sum()))
        self._count(NEAR_SINGULAR, found.near_singular)

    def _count(self, name: str, failed: int) -> None:
        if failed:
            self.counts[name] = max(failed, self.counts.get(name, 0))


def sdpa(case: Case, tolerance: float) -> Entrant:
    """One causal attention pass, queries given: the unit of all ratios."""
    del tolerance
    with torch.no_grad():
        query = case.map.queries(case.start, case.tensors)
    leaves = {"query": query.detach().requires_grad_(), **case.leaves("key", "value")}
    return Entrant(case, leaves, lambda q, k, v: merged(attention(case, k, q, v)))


def ours(case: Case, tolerance: float) -> Entrant:
    """`Implicit()` around the layer's solver, as `layer.solve` calls it."""
    return implicit(case, replace(case.layer.solver, rtol=tolerance, atol=tolerance), Implicit())


def implicit(case: Case, solver: Method, adjoint: Implicit) -> Entrant:
    function, report = case.function, Failures()
    problem = Problem(function, solver, function.system_ndim, function.row_ndim, report)
    leaves = case.leaves(*function.names)
    return Entrant(case, leaves, lambda *args: adjoint(problem, case.start, args).value, report.counts)


def unrolled(case: Case, tolerance: float) -> Entrant:
    """Ten iterations, each of them one SDPA pass, autograd through all."""
    del tolerance

    def attend(key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        y = merged(value)
        for _ in range(ITERATIONS):
            y = iteration(case, y, key, value, weight)
        return y

    return Entrant(case, case.leaves("key", "value", "weight"), attend)


def dense(case: Case, tolerance: float) -> Entrant:
    """Ten iterations as the seed wrote them: all scores as a matrix, autograd through all."""
    del tolerance
    length = case.start.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def attend(key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        y = merged(value)
        for _ in range(ITERATIONS):
            scores = key @ queries(case, y, weight).mT * case.layer.scale
            y = merged(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value)
        return y

    return Entrant(case, case.leaves("key", "value", "weight"), attend)


def torchdeq(solver: str) -> Callable[[Case, float], Entrant]:
    """torchdeq's `solver`, forward and for its implicit gradient, around SDPA.

    Its solvers stop when `||F(y) - y|| / ||F(y)||`, over a whole sample, is below the tolerance for the worst sample
    ("rel"; the alternative, "abs", would compare the norm of all N D components with the tolerance).

    Reference:
        torchdeq 0.1.0, `core.py` (`get_deq`, `DEQIndexing`), `solver/fp_iter.py`, `solver/anderson.py`, `grad.py`.
    """

    def enter(case: Case, tolerance: float) -> Entrant:
        from torchdeq import get_deq

        deq = get_deq(
            core="indexing", ift=True, f_solver=solver, b_solver=solver, f_max_iter=MAX_STEPS, b_max_iter=MAX_STEPS,
            f_tol=tolerance, b_tol=tolerance, f_stop_mode="rel", b_stop_mode="rel",
        )  # fmt: skip

        def attend(key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
            deq.train(torch.is_grad_enabled())  # in eval mode it prepares no gradient

            (y,), _ = deq(lambda y: iteration(case, y, key, value, weight), merged(value).detach())
            return y

        return Entrant(case, case.leaves("key", "value", "weight"), attend)

    return enter


def iteration(case: Case, y: Tensor, key: Tensor, value: Tensor, weight: Tensor | None) -> Tensor:
    """The map, by one SDPA pass."""
    return merged(attention(case, key, queries(case, y, weight), value))


def attention(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=case.layer.scale)


def merged(t: Tensor) -> Tensor:
    """`[B, H, N, d] -> [B, N, D]`."""
    return t.transpose(1, 2).flatten(2)


def queries(case: Case, y: Tensor, weight: Tensor | None) -> Tensor:
    """The layer's queries by PyTorch's own operations."""
    made = y if weight is None else F.linear(y, weight)
    made = made.unflatten(-1, (case.layer.num_heads, -1)).transpose(1, 2)
    return F.rms_norm(made, made.shape[-1:], eps=NORM_EPS) if case.layer.qk_norm else made


SDPA, OURS, OURS_INPUT = "sdpa", "ours", "ours-input"
OURS_ALL = (OURS, OURS_INPUT)
CONTESTANTS = {
    SDPA: Contestant("scaled_dot_product_attention, one pass", sdpa),
    OURS: Contestant("implicit-attention", ours, settles=True),
    OURS_INPUT: Contestant('implicit-attention, self_query="input"', ours, settles=True, self_query="input"),
    "unrolled": Contestant("10 unrolled SDPA iterations", unrolled),
    "seed": Contestant(
        "10 unrolled dense iterations (the seed)",
        dense,
        longest=2048,
        why="it keeps N x N weights per head and iteration: 11 GB at N = 4096, 86 GB at N = 16384",
    ),
    "torchdeq-picard": Contestant("torchdeq, fixed-point iteration", torchdeq("fixed_point_iter"), settles=True),
    "torchdeq-anderson": Contestant("torchdeq, Anderson", torchdeq("anderson"), settles=True),
}


def available(name: str) -> str:
    """Return why a contestant cannot enter, "" if it can."""
    if name.startswith("torchdeq") and find_spec("torchdeq") is None:
        return "torchdeq is not installed: pip install 'implicit-attention[bench]', or torchdeq itself."
    return ""
