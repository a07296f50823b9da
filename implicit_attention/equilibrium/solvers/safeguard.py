"""What extrapolating solvers share: their memory, and the return to the best iterate if an extrapolation fails."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.base import Solver
from implicit_attention.errors import check_positive

# A residual this many times the best one counts as failed. A smaller bound gives up steps that would recover, as
# accelerated residuals are not monotone; a larger one wastes steps far from the equilibrium.
_GROWTH = 2.0


class Safeguard(NamedTuple):
    """The best iterate of each system.

    Attributes:
        y: Best iterate so far, `[S, n]`.
        residual: `F(y) - y` at that iterate.
        norm: Its Euclidean norm, `[S]`.
        damping: Length of the next plain step from that iterate, `[S]`; each use halves it.
    """

    y: Tensor
    residual: Tensor
    norm: Tensor
    damping: Tensor

    @classmethod
    def init(cls, y: Tensor) -> "Safeguard":
        """Return the state before any residual is known."""
        count = y.shape[0]
        infinite = torch.full((count,), torch.inf, dtype=y.dtype, device=y.device)
        half = torch.full((count,), 0.5, dtype=y.dtype, device=y.device)
        return cls(y, torch.zeros_like(y), infinite, half)

    def check(self, y: Tensor, residual: Tensor) -> tuple["Safeguard", Tensor, Tensor]:
        """Compare a new residual with the best one.

        Args:
            y: Iterate `[S, n]`.
            residual: `F(y) - y`.

        Returns:
            The new state; which systems must restart, `[S]`; and the iterates from which they restart, `[S, n]`.
        """
        norm = torch.linalg.vector_norm(residual.detach(), dim=-1)
        restart = ~(norm <= _GROWTH * self.norm)  # NaN restarts too
        better = norm < self.norm
        best = Safeguard(
            torch.where(better[:, None], y, self.y),
            torch.where(better[:, None], residual, self.residual),
            torch.where(better, norm, self.norm),
            torch.where(restart, self.damping / 2, self.damping),
        )
        return best, restart, best.y + self.damping[:, None] * best.residual


class Steps(NamedTuple):
    """What an extrapolating solver keeps between steps.

    Attributes:
        y: Previous iterate, `[S, n]`; None before the first step.
        residual: Its residual.
        left: Stack of vectors, `[k, S, n]`; each solver says which.
        right: Stack of vectors, `[k, S, n]`.
        guard: The best iterate.
    """

    y: Tensor | None
    residual: Tensor | None
    left: Tensor
    right: Tensor
    guard: Safeguard


@dataclass(frozen=True)
class Extrapolating(Solver):
    """Base of the solvers that extrapolate from recent steps.

    Attributes:
        memory: Number of vectors in each of the two stacks.
    """

    memory: int = 5

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("memory", self.memory, integer=True)

    def init(self, y: Tensor) -> Steps:
        """Return the state before the first step."""
        empty = y.new_zeros(0, *y.shape)
        return Steps(None, None, empty, empty, Safeguard.init(y))
