"""Is a contestant right? Asked before anything is timed, at a length where a float64 answer is cheap."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.peers import ITERATIONS, Case, Contestant, Entrant
from benchmarks.reference import Tensors

ROUNDING = 4.0  # how many times the rounding error of the plain formula in float32 is allowed


class Gate:
    """Float64 answers for a case, made once for all contestants.

    A contestant that settles is held to its own residual r = F(y) - y: to first order it lies `(I - J)^{-1} r` from
    the equilibrium, so at most `A |r|` with `A = ||(I - J)^{-1}||`; twice that is allowed for the second order. Its
    gradient is taken at y, and its adjoint has a tolerance t of its own: relative to |F(y)| and to the gradient's norm,
    `A (|r| / |F(y)| + t)`, times four. A fixed recipe is held to the same recipe in float64, up to the rounding error
    that the plain dense formula makes in float32.
    """

    def __init__(self, case: Case, tolerance: float) -> None:
        self.case, self.tolerance = case, tolerance
        self.y, self.gradients = reference.equilibrium(case.map, case.tensors, case.cotangent)
        self.amplification = reference.amplification(case.map, case.tensors, self.y)

    def check(self, contestant: Contestant) -> dict[str, Any]:
        """Compare the outputs of both passes, and the gradients; `correct` says whether they are what they claim."""
        entrant = contestant.enter(self.case, self.tolerance)
        forward, (y, gradients) = entrant.forward(), entrant.forward_backward()
        compare = self._settled if contestant.settles else self._recipe
        result = compare(entrant, [forward, y], gradients)
        result["correct"] = (
            all(e <= limit for e, limit in zip(result["output_errors"], result["output_limits"], strict=True))
            and max(result["gradient_errors"].values()) <= result["gradient_limit"]
        )
        if "query" in entrant.leaves:  # nothing to settle
            return result
        return result | reached(self.case, y, self.tolerance) | {"failures": entrant.failures}

    def _settled(self, entrant: Entrant, outputs: list[Tensor], gradients: Tensors) -> dict[str, Any]:
        pairs = [reference.residuals(self.case.map, y, self.case.tensors) for y in outputs]
        relative = float(pairs[-1][0].norm() / pairs[-1][1].norm())
        return {
            "compared_with": "the equilibrium and its implicit gradient in float64",
            "amplification": self.amplification,
            "output_errors": [distance(y, self.y) for y in outputs],
            "output_limits": [2 * self.amplification * float(residual.norm()) for residual, _ in pairs],
            "gradient_errors": relative_errors(gradients, {n: self.gradients[n] for n in entrant.leaves}),
            "gradient_limit": 4 * self.amplification * (relative + self.tolerance),
        }

    def _recipe(self, entrant: Entrant, outputs: list[Tensor], gradients: Tensors) -> dict[str, Any]:
        exact, plain = (recipe(self.case, entrant.leaves, dtype) for dtype in (torch.float64, torch.float32))
        return {
            "compared_with": "the same recipe in float64",
            "output_errors": [distance(y, exact[0]) for y in outputs],
            "output_limits": [ROUNDING * distance(plain[0], exact[0])] * len(outputs),
            "gradient_errors": relative_errors(gradients, exact[1]),
            "gradient_limit": ROUNDING * max(relative_errors(plain[1], exact[1]).values()),
        }


def recipe(case: Case, leaves: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensors]:
    """The plain formula: one attention pass where queries are given, else a fixed number of iterations."""
    given = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    length = case.start.shape[1]
    if "query" in given:
        y = case.map.attend(given["query"], given, slice(0, length))
    else:
        y = reference.start(given)
        for _ in range(ITERATIONS):
            y = case.map(y, given, chunk=length)
    gradients = torch.autograd.grad(y, list(given.values()), case.cotangent.to(dtype))
    return y.detach(), dict(zip(given, gradients, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def relative_errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """By leaf: the error's norm relative to the gradient's."""
    return {name: distance(found[name], e) / float(e.double().norm()) for name, e in expected.items()}


def reached(case: Case, y: Tensor, tolerance: float) -> dict[str, Any]:
    """How well `y` solves the equation, measured in float64 by one application of the map.

    The tolerance t is reached if every component of every row's residual is within t + t max|F(y)_row|, this
    library's measure, or if each sample's |F(y) - y| is within t |F(y)|, torchdeq's.
    """
    residual, image = reference.residuals(case.map, y, case.tensors)
    rows, sizes = residual.abs().amax(-1), image.abs().amax(-1)
    relative = float((residual.flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)).max())
    return {
        "largest_residual": float(rows.max()),
        "relative_residual": relative,
        "reached_tolerance": bool((rows <= tolerance * (1 + sizes)).all()) or relative <= tolerance,
    }
