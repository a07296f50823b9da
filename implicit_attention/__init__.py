"""Implicit-query attention: attention whose queries are made from its own output, solved to equilibrium."""

from implicit_attention.adjoints import Implicit, Phantom, Unrolled
from implicit_attention.cache import DecodeCache
from implicit_attention.errors import ConvergenceError, ConvergenceWarning
from implicit_attention.fixed_point import fixed_point
from implicit_attention.forward_substitution import ForwardSubstitution
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.positions import ALiBi, RelativeBias, Rotary
from implicit_attention.seed import ImplicitQueryAttentionLinearV
from implicit_attention.solvers import Anderson, Broyden, NewtonKrylov, Picard, Solution

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "DecodeCache",
    "ForwardSubstitution",
    "Implicit",
    "ImplicitQueryAttention",
    "ImplicitQueryAttentionLinearV",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "RelativeBias",
    "Rotary",
    "Solution",
    "Unrolled",
    "fixed_point",
]
