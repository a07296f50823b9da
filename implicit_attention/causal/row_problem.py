"""The row equations of a causal equilibrium, for many rows at once.

If attention a to all earlier columns is known, the output of a row is `y_h = (1 - p_h) a_h + p_h v_h` per head. The
weights p on its own column solve H equations, `p = sigmoid(score(p) + offset)`. The query map mixes heads, so the
equations are coupled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

_SQUARINGS = 24  # n = 2^24: a Jordan block of size k leaves a relative error of about k log(n) / n = k 1e-6


@dataclass(frozen=True)
class RowProblem:
    r"""R problems `p = sigmoid(score(p) + offset)` in H unknowns each.

    The score is linear, `alpha + beta p`, or with normed queries `(alpha + beta p) / rms(p)`, where
    `rms(p)^2 = (1, p)^T gram (1, p)`.

    Attributes:
        alpha: Scores at p = 0, `[R, H]` (the numerator with normed queries).
        beta: `[R, H, H]`; row h holds the derivatives of head h's score (of its numerator) by p.
        offset: `[R, H]`: bias of the row's own column minus the log-sum-exp of all others. `-inf` if the row does not
            see itself (p = 0), `+inf` if it sees no other column (p = 1).
        gram: `[R, H, H + 1, H + 1]`, symmetric, or None for linear scores.
    """

    alpha: Tensor
    beta: Tensor
    offset: Tensor
    gram: Tensor | None = None

    def score(self, p: Tensor) -> Tensor:
        """Return the scores at `p`, `[R, H]`."""
        return _affine(self.alpha, self.beta, p) if self.gram is None else self._normed(p)[0]

    def target(self, p: Tensor) -> Tensor:
        """Return `sigmoid(score(p) + offset)`, `[R, H]`."""
        return self.evaluate(p)[0]

    def linearize(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target `[R, H]` and its Jacobian `[R, H, H]` at `p`."""
        target, slope = self.evaluate(p)
        return target, (target * (1.0 - target))[..., None] * slope()

    def evaluate(self, p: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return the target `[R, H]` at `p` and a function that returns the Jacobian of the scores, `[R, H, H]`."""
        if self.gram is None:
            return torch.sigmoid(_affine(self._constant, self.beta, p)), lambda: self.beta
        score, inverse, half = self._normed(p)

        def slope() -> Tensor:
            return (self.beta - (score * inverse)[..., None] * half[..., 1:]) * inverse[..., None]

        return torch.sigmoid(score + self.offset), slope

    def size(self) -> Tensor:
        """Return how large a term of a score may be, `[R]`, in nats; with normed queries as at p = 1."""
        size = self.alpha.abs() + self.beta.abs().sum(-1)
        if self.gram is not None:
            size = size * self._normed(torch.ones_like(self.alpha))[1]
        size = size + self.offset.abs().masked_fill(self.offset.isinf(), 0.0)
        return size.amax(-1)

    def rounding(self, p: Tensor) -> Tensor:
        """Return how far rounding may move the target at `p`, `[R]`. Smaller residuals carry no information."""
        size = self.alpha.abs() + (self.beta.abs() @ p[..., None])[..., 0]
        if self.gram is not None:
            score, inverse, _ = self._normed(p)
            one_p = pad(p, (1, 0), value=1.0)[:, None, :, None]
            terms = (one_p.mT @ self.gram.abs() @ one_p)[..., 0, 0]
            size = size * inverse + 0.5 * score.abs() * terms * inverse.square()
        target = self.target(p)
        size = size + self.offset.abs().masked_fill(self.offset.isinf(), 0.0)
        noise: Tensor = torch.finfo(p.dtype).eps * (1.0 + size * target * (1.0 - target)).amax(-1)
        return noise

    def rows(self, index: Tensor | slice) -> "RowProblem":
        """Return the problems of some rows, by mask, index or slice."""
        gram = None if self.gram is None else self.gram[index]
        return RowProblem(self.alpha[index], self.beta[index], self.offset[index], gram)

    def double(self) -> "RowProblem":
        """Return the problems in float64; on the CPU if their device has none (MPS, some XPU)."""
        parts = [self.alpha, self.beta, self.offset] + ([] if self.gram is None else [self.gram])
        if not _has_float64(self.alpha.device):
            parts = [part.cpu() for part in parts]
        return RowProblem(*(part.double() for part in parts))

    @cached_property
    def _constant(self) -> Tensor:
        return self.alpha + self.offset

    def _normed(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores `[R, H]`, `1 / rms` `[R, H]` and `gram (1, p)` `[R, H, H + 1]`."""
        assert self.gram is not None
        one_p = pad(p, (1, 0), value=1.0)
        half = torch.bmm(self.gram.flatten(1, 2), one_p[..., None]).view(self.gram.shape[:-1])
        inverse = (half * one_p[:, None]).sum(-1).rsqrt()
        return _affine(self.alpha, self.beta, p) * inverse, inverse, half


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1.0)
    except (TypeError, RuntimeError):
        return False
    return True


def _affine(constant: Tensor, matrix: Tensor, p: Tensor) -> Tensor:
    return torch.baddbmm(constant[..., None], matrix, p[..., None])[..., 0]


def gains(problem: RowProblem, p: Tensor) -> Tensor:
    """Return the spectral radius of the target's Jacobian: the factor by which plain iteration reduces an error.

    One head: `|p (1 - p) score'(p)|`. Several heads: `||J^n||^(1/n)` at n = 2^24 by repeated squaring, exact to about
    1e-6 and rounding. It is differentiable wherever the radius is; the gradient of a zero radius is zero.

    Args:
        problem: R problems.
        p: `[R, H]`, usually their roots.

    Returns:
        `[R]`; NaN for rows that hold NaN.

    Reference:
        I. Gelfand, "Normierte Ringe", Mat. Sbornik 9 (1941).
    """
    return gelfand_radius(problem.linearize(p)[1])


def gelfand_radius(power: Tensor) -> Tensor:
    """Return the spectral radius of matrices `[R, H, H]` by the method of `gains`.

    Args:
        power: The matrices.

    Returns:
        `[R]`; NaN where a matrix holds NaN.
    """
    if power.shape[-1] == 1:
        return power[:, 0, 0].abs()
    sizes = []
    for _ in range(_SQUARINGS + 1):
        size = torch.linalg.vector_norm(power, dim=(-2, -1))  # divided out, so that powers do not overflow
        sizes.append(torch.where(size == 0.0, 1.0, size))
        power = power / sizes[-1][:, None, None]
        power = torch.bmm(power, power)
    shares = 0.5 ** torch.arange(len(sizes), dtype=power.dtype, device=power.device)
    radius = (torch.stack(sizes, -1).log() @ shares).exp()
    return torch.where(size == 0.0, 0.0, radius)
