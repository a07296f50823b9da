"""Broyden's method with limited memory: a quasi-Newton matrix from the recent steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.safeguard import Extrapolating, Steps
from implicit_attention.equilibrium.solvers.system import System

_USABLE = 1e-4  # cosine: an update along a step at a wider angle to its change would all but destroy the matrix


@dataclass(frozen=True)
class Broyden(Extrapolating):
    """Broyden's "good" method on `y - F(y) = 0`. It starts from the identity, that is with a Picard step.

    If the memory is full, it starts again from the identity. If a residual grows beyond twice the best one, the system
    returns to its best iterate and takes a shorter, plain step.

    Attributes:
        memory: Number of rank-one updates that are kept. The solve takes the memory of `2 memory + 5` iterates.

    Reference:
        Broyden, Math. Comp. 19 (1965); limited memory as in Bai, Kolter and Koltun, "Deep Equilibrium
        Models", arXiv 1909.01377.
    """

    memory: int = 20

    def step(self, system: System, y: Tensor, f: Tensor, state: Steps, active: Tensor) -> tuple[Tensor, Steps]:
        """Return the quasi-Newton iterate."""
        residual = f - y
        guard, restart, back = state.guard.check(y, residual)
        u, w = state.left, state.right  # [k, S, n]: the inverse Jacobian of y - F(y) is H = I + sum_k u_k w_k^T
        if len(u) >= self.memory:
            u, w = u[:0], w[:0]
        elif state.y is not None and state.residual is not None:
            u, w = self._update(u, w, y - state.y, state.residual - residual)
        keep = ~restart[None, :, None]
        u, w = u * keep, w * keep
        proposal = torch.where(restart[:, None], back, y + _apply(u, w, residual))
        return proposal, Steps(y, residual, u, w, guard)

    def _update(self, u: Tensor, w: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(s - H z) s^T H / (s^T H z)`, where z is the change of `y - F(y)` along the step s."""
        h_z = _apply(u, w, z)
        s_h = _apply(w, u, s)  # s^T H
        scale = (s * h_z).sum(-1)
        size = torch.linalg.vector_norm(s, dim=-1) * torch.linalg.vector_norm(h_z, dim=-1)
        usable = scale.abs() > _USABLE * size
        factor = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
        return torch.cat([u, ((s - h_z) * factor[:, None])[None]]), torch.cat([w, s_h[None]])


def _apply(u: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """`(I + sum_k u_k w_k^T) t` for `[k, S, n]` and `[S, n]`."""
    return t + torch.einsum("ksn,sk->sn", u, torch.einsum("ksn,sn->sk", w, t))
