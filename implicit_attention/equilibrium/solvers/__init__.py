"""Solvers of `y = F(y)`: one frozen record of settings per file. The only loop is in `base`."""

from implicit_attention.equilibrium.solvers.anderson import Anderson
from implicit_attention.equilibrium.solvers.base import DirectSolver, Method, Solver, solve
from implicit_attention.equilibrium.solvers.broyden import Broyden
from implicit_attention.equilibrium.solvers.newton_krylov import NewtonKrylov
from implicit_attention.equilibrium.solvers.picard import Picard
from implicit_attention.equilibrium.solvers.solution import Solution

__all__ = ["Anderson", "Broyden", "DirectSolver", "Method", "NewtonKrylov", "Picard", "Solution", "Solver", "solve"]
