"""Newton's method with GMRES on Jacobian products for its linear systems."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit_attention.equilibrium.linear import gmres
from implicit_attention.equilibrium.solvers.base import Solver
from implicit_attention.equilibrium.solvers.system import System
from implicit_attention.errors import bad_value, check_positive

_HALVINGS = 8  # of a step at most: each costs an evaluation, and steps below 1/256 hardly move the iterate
_DECREASE = 1e-4  # share of the predicted decrease that a step must reach (Armijo's rule, usual value)
_GAMMA = 0.9  # forcing terms of Eisenstat and Walker, choice 2, with exponent 2


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Inexact Newton: solve `(I - J) d = F(y) - y` by GMRES, then take the first `y + 2^-k d` that lowers the residual.

    The map need not contract: the method converges to equilibria that repel Picard's iteration.

    Attributes:
        restart: Number of Krylov directions in memory, each of the size of an iterate.
        cycles: Maximum number of GMRES restarts per Newton step.
        forcing: Largest relative residual of the linear solves. They tighten as the residual falls.

    Reference:
        Knoll and Keyes, J. Comput. Phys. 193 (2004); forcing terms: Eisenstat and Walker, SIAM J. Sci.
        Comput. 17 (1996), choice 2.
    """

    restart: int = 30
    cycles: int = 4
    forcing: float = 0.1

    unrollable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        for name in ("restart", "cycles"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("forcing", self.forcing)
        if self.forcing >= 1:
            raise bad_value("forcing", "in (0, 1)", self.forcing)

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return (
            f"Raise max_steps (it is {self.max_steps}), cycles (it is {self.cycles}) or the tolerances, or compute in "
            "a wider dtype."
        )

    def init(self, y: Tensor) -> Tensor:
        """Return infinite residual norms: none is known before the first step."""
        return torch.full(y.shape[:1], torch.inf, dtype=y.dtype, device=y.device)

    def step(self, system: System, y: Tensor, f: Tensor, state: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Return the iterate after one Newton step and its line search."""
        residual = torch.where(active[:, None], f - y, 0.0)
        norm = torch.linalg.vector_norm(residual, dim=-1)
        ratio = torch.where(torch.isfinite(state), norm / state.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)
        accuracy = (_GAMMA * ratio**2).clamp(max=self.forcing, min=10 * torch.finfo(norm.dtype).eps)
        direction, _ = gmres(
            lambda t: t - system.jvp(y, t), residual, rtol=accuracy, restart=self.restart, cycles=self.cycles
        )
        return self._line_search(system, y, direction, norm, active), norm

    def _line_search(self, system: System, y: Tensor, direction: Tensor, norm: Tensor, active: Tensor) -> Tensor:
        length = torch.ones_like(norm)
        for _ in range(_HALVINGS):
            trial = y + length[:, None] * direction
            size = torch.linalg.vector_norm(system(trial) - trial, dim=-1)
            short = ~(size <= (1.0 - _DECREASE * length) * norm) & active  # NaN means that the step is too long
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        return y + length[:, None] * direction
