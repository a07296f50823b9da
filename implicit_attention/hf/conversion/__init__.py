"""Conversion: a trained decoder becomes one of implicit blocks, with the same weights and at first the same outputs.

With `query_input=True` and `Omega_Q = 0` a causal layer is ordinary grouped-query attention. Its rows belong to keys,
so `W_K` is the trained query projection, and `W_Q` is the trained key projection.
"""

from implicit_attention.hf.conversion.architecture import ConversionError
from implicit_attention.hf.conversion.convert import Converted, convert, converted

__all__ = ["ConversionError", "Converted", "convert", "converted"]
