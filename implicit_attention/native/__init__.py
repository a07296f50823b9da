"""Compiled diagonal blocks for the CPU (numba). Importing this room does not import numba; using it does."""
