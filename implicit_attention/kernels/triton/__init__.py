"""Triton kernels: the diagonal blocks of a causal solve and of its adjoint, the merge by log-sum-exp.

Importing this room does not import triton; its modules, which do, are imported where they are used. They know tensors
alone; `triton_blocks` calls them for a causal map.
"""

import os


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, as the environment says; ask before the first one runs."""
    return os.environ.get("TRITON_INTERPRET") == "1"
