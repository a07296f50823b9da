"""Implicit-query attention: attention whose queries are made from its own output, solved to equilibrium."""

from implicit_attention import renamed
from implicit_attention.attention.contraction import Contraction
from implicit_attention.attention.positions import ALiBi, RelativeBias, Rotary
from implicit_attention.cache import DecodeCache
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Implicit, Phantom, Unrolled
from implicit_attention.equilibrium.fixed_point import fixed_point
from implicit_attention.equilibrium.solvers import Anderson, Broyden, NewtonKrylov, Picard, Solution
from implicit_attention.errors import CollapseWarning, ConvergenceError, ConvergenceWarning
from implicit_attention.inspection import diagnostics, plots
from implicit_attention.inspection.inspecting import inspect
from implicit_attention.inspection.instruments import solver_figures
from implicit_attention.inspection.records import LayerReport, Trouble
from implicit_attention.inspection.report import Report
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.seed import ImplicitQueryAttentionLinearV

renamed.install()

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "Anderson",
    "Broyden",
    "CollapseWarning",
    "Contraction",
    "ConvergenceError",
    "ConvergenceWarning",
    "DecodeCache",
    "ForwardSubstitution",
    "Implicit",
    "ImplicitQueryAttention",
    "ImplicitQueryAttentionLinearV",
    "LayerReport",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "RelativeBias",
    "Report",
    "Rotary",
    "Solution",
    "Trouble",
    "Unrolled",
    "diagnostics",
    "fixed_point",
    "inspect",
    "plots",
    "solver_figures",
]
