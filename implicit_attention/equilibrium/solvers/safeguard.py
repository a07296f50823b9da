"""The way back for solvers that extrapolate: return to the best iterate and take a shorter plain step."""

from typing import NamedTuple

import torch
from torch import Tensor

_GROWTH = 2.0  # a residual this many times the best one means that the extrapolation misled


class Safeguard(NamedTuple):
    """What is remembered between steps.

    Attributes:
        y: Best iterate so far, `[S, n]`.
        residual: `F(y) - y` there.
        norm: Its Euclidean norm, `[S]`.
        damping: Length of the next plain step back from there, halved each time it is needed, `[S]`.
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
        """Compare a new residual with the best.

        Args:
            y: Iterate `[S, n]`.
            residual: `F(y) - y`.

        Returns:
            The state to keep; `[S]`, which systems must restart; and where these go on, `[S, n]`.
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
