"""The causal map in plain PyTorch, from its formula: what every contestant is checked against.

Shares no code with the package. Any dtype; nothing here is fast.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class CausalMap:
    """`y_i = sum_{j <= i} softmax_j(scale k_i . q_j) v_j`, `q = phi(y)`; outputs `[B, N, D]`.

    Its tensors: `key`, `value` `[B, H, N, d]`; `weight` (Omega_Q) `[D, D]` unless the keys have absorbed it;
    `self_score` `[B, H, N]` where a token's own score is given and not made from the unknown; `feedback` (Psi_V)
    `[D, D]` where later rows see `v_j + Psi_V y_j / rms(y_j)`.
    """

    scale: float
    normalize: bool

    def queries(self, y: Tensor, tensors: Tensors) -> Tensor:
        heads, dim = tensors["key"].shape[1], tensors["key"].shape[3]
        weight = tensors.get("weight")
        made = y if weight is None else F.linear(y, weight)
        made = made.unflatten(-1, (heads, dim)).transpose(1, 2)
        return made * torch.rsqrt(made.square().mean(-1, keepdim=True) + NORM_EPS) if self.normalize else made

    def attend(self, query: Tensor, tensors: Tensors, rows: slice, y: Tensor | None = None) -> Tensor:
        """Rows `rows` of the output, `[B, r, D]`, with dense scores; values read `y` where it is given."""
        weights, value = torch.softmax(self.scores(query, tensors, rows), -1), tensors["value"]
        seen = value if y is None else value + self.fed(y, tensors)
        out: Tensor = weights @ seen[:, :, : rows.stop]
        if y is not None:  # a row's own column does not read its output
            own = weights.diagonal(rows.start, dim1=-2, dim2=-1)[..., None]
            out = out + own * (value - seen)[:, :, rows]
        return out.transpose(1, 2).flatten(2)

    def fed(self, y: Tensor, tensors: Tensors) -> Tensor:
        """What values read from outputs, `[B, H, N, d]`."""
        read = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)
        made = F.linear(read, tensors["feedback"])
        return made.unflatten(-1, (tensors["key"].shape[1], -1)).transpose(1, 2)

    def scores(self, query: Tensor, tensors: Tensors, rows: slice) -> Tensor:
        """Scores of some rows against all columns before their end, `[B, H, r, rows.stop]`; -inf: hidden."""
        scores: Tensor = self.scale * (tensors["key"][:, :, rows] @ query[:, :, : rows.stop].mT)
        index = torch.arange(rows.stop, device=query.device)
        own = index == index[rows, None]
        if "self_score" in tensors:
            scores = torch.where(own, tensors["self_score"][:, :, rows, None].to(scores.dtype), scores)
        return scores.masked_fill(index > index[rows, None], -torch.inf)

    def __call__(self, y: Tensor, tensors: Tensors, chunk: int = 512) -> Tensor:
        """Apply the map once, `chunk` rows at a time."""
        query, length = self.queries(y, tensors), y.shape[1]
        pieces = [slice(low, min(low + chunk, length)) for low in range(0, length, chunk)]
        read = y if "feedback" in tensors else None
        return torch.cat([self.attend(query, tensors, rows, read) for rows in pieces], 1)

    def score_std(self, y: Tensor, tensors: Tensors, rows: int = 64) -> float:
        """Standard deviation of the visible scores, in at most `rows` rows at equal distances, the last among them."""
        query, length = self.queries(y, tensors), y.shape[1]
        step = max(1, length // rows)
        picked = range(length - 1, 0, -step)
        parts = [self.scores(query, tensors, slice(i, i + 1)).double().flatten() for i in picked]
        return float(torch.cat(parts).std())


def residuals(function: CausalMap, y: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """`F(y) - y` and `F(y)` in float64, whatever dtype `y` was found in."""
    wide = {name: t.double() for name, t in tensors.items()}
    with torch.no_grad():
        image = function(y.double(), wide)
        return image - y.double(), image


def start(tensors: Tensors) -> Tensor:
    """The seed's start, y = V, `[B, N, D]`."""
    return tensors["value"].transpose(1, 2).flatten(2)


def equilibrium(
    function: CausalMap, tensors: Tensors, cotangent: Tensor, *, limit: float = 1e-13, steps: int = 500
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equilibrium that plain iteration from y = V leads to, and its implicit gradients, in float64.

    Raises:
        ArithmeticError: If plain iteration does not converge: then this reference is of no use.
    """
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items()}
    with torch.no_grad():
        y = iterate(lambda y: function(y, leaves), start(leaves).detach(), limit, steps)
    y.requires_grad_()
    image = function(y, leaves)
    grad = cotangent.double()

    def adjoint(lam: Tensor) -> Tensor:
        return grad + torch.autograd.grad(image, y, lam, retain_graph=True)[0]

    lam = iterate(adjoint, grad, limit * float(grad.abs().max()), steps)
    gradients = torch.autograd.grad(image, list(leaves.values()), lam)
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def iterate(function: Callable[[Tensor], Tensor], y: Tensor, limit: float, steps: int) -> Tensor:
    for _ in range(steps):
        before, y = y, function(y)
        if float((y - before).abs().max()) <= limit:
            return y
    raise ArithmeticError(
        f"Plain iteration is not within {limit:g} after {steps} steps, so there is nothing to compare with at these "
        "sizes and weights. Choose others: more heads make plain iteration converge more often."
    )


def amplification(function: CausalMap, tensors: Tensors, y: Tensor, iterations: int = 8) -> float:
    """Estimate `||(I - J)^{-1}||_2` at the equilibrium `y`: how much farther off than its residual a value can lie.

    Power iteration on the product of the inverse with its transpose, each applied by its Neumann series. (For a
    causal map the spectral radius is no measure of this: J is triangular, and far from normal.)
    """
    wide = {name: t.double() for name, t in tensors.items()}
    _, pull = torch.func.vjp(lambda at: function(at, wide), y)
    _, push = torch.func.vjp(lambda lam: pull(lam)[0], torch.zeros_like(y))  # the transpose of the transpose

    def solve(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
        return iterate(lambda e: right + product(e), right, 1e-4 * float(right.abs().max()), 500)

    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).to(y.device)
    growth = 1.0
    for _ in range(iterations):
        direction = direction / direction.norm()
        direction = solve(lambda t: pull(t)[0], solve(lambda t: push(t)[0], direction))
        growth = math.sqrt(float(direction.norm()))
    return growth
