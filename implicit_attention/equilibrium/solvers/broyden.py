"""Broyden's method with limited memory: a quasi-Newton matrix built from the steps taken."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.base import Solver, System
from implicit_attention.equilibrium.solvers.safeguard import Safeguard
from implicit_attention.errors import check_positive


class _State(NamedTuple):
    y: Tensor | None
    residual: Tensor | None
    u: Tensor  # [k, S, n]
    w: Tensor  # [k, S, n]: the inverse Jacobian of y - F(y) is I + sum_k u_k w_k^T
    guard: Safeguard


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's "good" method on `y - F(y) = 0`, started from the identity (so with a Picard step).

    When the memory is full it starts again from the identity. A system whose residual grows beyond twice its
    best returns to its best iterate and restarts with a shorter, plain step.

    Attributes:
        memory: Rank-one updates remembered; memory of the solve is `(2 memory + 5)` iterates.

    Reference:
        Broyden, Math. Comp. 19 (1965); limited memory as in Bai, Kolter and Koltun, "Deep Equilibrium
        Models", arXiv 1909.01377.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("memory", self.memory, integer=True)

    def init(self, y: Tensor) -> _State:
        """Return the state before the first step."""
        empty = y.new_zeros(0, *y.shape)
        return _State(None, None, empty, empty, Safeguard.init(y))

    def step(self, system: System, y: Tensor, f: Tensor, state: _State, active: Tensor) -> tuple[Tensor, _State]:
        """Return the quasi-Newton iterate."""
        residual = f - y
        guard, restart, back = state.guard.check(y, residual)
        u, w = state.u, state.w
        if len(u) >= self.memory:
            u, w = u[:0], w[:0]
        elif state.y is not None and state.residual is not None:
            u, w = self._update(u, w, y - state.y, state.residual - residual)
        keep = ~restart[None, :, None]
        u, w = u * keep, w * keep
        proposal = torch.where(restart[:, None], back, y + _apply(u, w, residual))
        return proposal, _State(y, residual, u, w, guard)

    def _update(self, u: Tensor, w: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(s - H z) s^T H / (s^T H z)`, where z is the change of y - F(y) along s."""
        h_z = _apply(u, w, z)
        s_h = _apply(w, u, s)  # s^T H
        scale = (s * h_z).sum(-1)
        size = torch.linalg.vector_norm(s, dim=-1) * torch.linalg.vector_norm(h_z, dim=-1)
        usable = scale.abs() > 1e-4 * size  # else the update would all but destroy the matrix
        factor = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
        return torch.cat([u, ((s - h_z) * factor[:, None])[None]]), torch.cat([w, s_h[None]])


def _apply(u: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """`(I + sum_k u_k w_k^T) t` for `[k, S, n]` and `[S, n]`."""
    return t + torch.einsum("ksn,sk->sn", u, torch.einsum("ksn,sn->sk", w, t))
