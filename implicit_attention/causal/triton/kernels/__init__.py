"""Triton kernels of the causal engine: the diagonal blocks, their adjoint, the merge by log-sum-exp, one new token.

They know tensors alone; the modules of `causal.triton` call them for a causal map. Importing this package does not
import triton; its modules do, and are imported where they are used.
"""
