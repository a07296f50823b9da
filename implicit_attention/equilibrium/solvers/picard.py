"""Picard's iteration, as in the seed, with optional damping."""

from dataclasses import dataclass

from torch import Tensor

from implicit_attention.equilibrium.solvers.base import Solver
from implicit_attention.equilibrium.solvers.system import System
from implicit_attention.errors import bad_value, check_positive


@dataclass(frozen=True)
class Picard(Solver):
    """`y <- y + damping (F(y) - y)`.

    It converges if the damped map contracts. Damping helps if the Jacobian has large negative eigenvalues: for
    eigenvalues in [-rho, 0] a damping below 2 / (1 + rho) converges.

    Attributes:
        damping: Length of a step, in (0, 1]; 1 is the plain iteration.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("damping", self.damping)
        if self.damping > 1:
            raise bad_value("damping", "in (0, 1]", self.damping)

    @property
    def remedy(self) -> str:
        """What to try where the tolerance is missed, as a sentence."""
        return (
            f"Raise max_steps (it is {self.max_steps}) or the tolerances, damp (Picard(damping={self.damping / 2:g})), "
            "or use NewtonKrylov()."
        )

    def init(self, y: Tensor) -> None:
        """Return None: the iteration has no memory."""

    def step(self, system: System, y: Tensor, f: Tensor, state: None, active: Tensor) -> tuple[Tensor, None]:
        """Return the next iterate."""
        return (f if self.damping == 1.0 else y + self.damping * (f - y)), None
