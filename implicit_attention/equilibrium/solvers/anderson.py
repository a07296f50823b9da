"""Anderson acceleration: extrapolation from recent steps to the combination with the smallest residual."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.equilibrium.solvers.safeguard import Extrapolating, Steps
from implicit_attention.equilibrium.solvers.system import System
from implicit_attention.errors import bad_value, check_positive


@dataclass(frozen=True)
class Anderson(Extrapolating):
    r"""`y <- y + b r - (dY + b dR) g`, where `r = F(y) - y` and `g` minimises `|r - dR g|`.

    The differences are scaled to unit length and the least-squares problem is regularised, so it is never singular. If
    a residual grows beyond twice the best one, the system returns to its best iterate and takes a shorter, plain step.

    Attributes:
        memory: Number m of differences that are kept. The solve takes the memory of `2 m + 5` iterates.
        mixing: The b above, in (0, 1].
        regularization: Added to the unit diagonal of the normal equations; None for the square root of the dtype's
            machine epsilon.

    Reference:
        Anderson, J. ACM 12 (1965); Walker and Ni, SIAM J. Numer. Anal. 49 (2011), type II; as a DEQ solver:
        Bai, Koltun and Kolter (2020), torchdeq (Geng and Kolter, arXiv 2310.18605).
    """

    memory: int = 5
    mixing: float = 1.0
    regularization: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("mixing", self.mixing)
        if self.mixing > 1:
            raise bad_value("mixing", "in (0, 1]", self.mixing)
        if self.regularization is not None:
            check_positive("regularization", self.regularization)

    def step(self, system: System, y: Tensor, f: Tensor, state: Steps, active: Tensor) -> tuple[Tensor, Steps]:
        """Return the accelerated iterate."""
        residual = f - y
        guard, restart, back = state.guard.check(y, residual)
        dy, dr = state.left, state.right  # differences of iterates and of residuals [m, S, n]
        if state.y is not None and state.residual is not None:
            dy = torch.cat([dy, (y - state.y)[None]])[-self.memory :]
            dr = torch.cat([dr, (residual - state.residual)[None]])[-self.memory :]
            keep = ~restart[None, :, None]
            dy, dr = dy * keep, dr * keep
        proposal = y + self.mixing * residual
        if len(dr):
            gamma = self._weights(dr, residual)
            proposal = proposal - torch.einsum("msn,sm->sn", dy + self.mixing * dr, gamma)
        proposal = torch.where(restart[:, None], back, proposal)
        return proposal, Steps(y, residual, dy, dr, guard)

    def _weights(self, dr: Tensor, residual: Tensor) -> Tensor:
        """Solve the regularised least-squares problem; return `[S, m]`."""
        norms = torch.linalg.vector_norm(dr.detach(), dim=-1)  # [m, S]; only a scaling: its derivative cancels
        inverse = torch.where(norms > 0, 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0).mT
        gram = torch.einsum("isn,jsn->sij", dr, dr) * inverse[:, :, None] * inverse[:, None, :]
        right = torch.einsum("msn,sn->sm", dr, residual) * inverse
        eps = torch.finfo(dr.dtype).eps ** 0.5 if self.regularization is None else self.regularization
        # float64: the normal equations square the condition number.
        eye = torch.eye(len(dr), dtype=torch.float64, device=dr.device)
        solved: Tensor = torch.linalg.solve(gram.double() + eps * eye, right.double()[..., None])[..., 0]
        return solved.to(dr.dtype) * inverse
