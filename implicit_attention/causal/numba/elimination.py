"""Small systems of linear equations, compiled: Gaussian elimination with pivots."""

from typing import Any

from implicit_attention.causal.numba.machine import exact


@exact
def factor(matrix: Any, pivots: Any) -> float:
    """Factor a matrix `[n, n]` in place; return the sign of its determinant, 0 if a pivot vanishes."""
    n, sign = len(pivots), 1.0
    for k in range(n):
        best = k
        for i in range(k + 1, n):
            if abs(matrix[i, k]) > abs(matrix[best, k]):
                best = i
        pivots[k] = best
        if best != k:
            sign = -sign
            for j in range(n):
                matrix[k, j], matrix[best, j] = matrix[best, j], matrix[k, j]
        pivot = matrix[k, k]
        if pivot == 0.0:
            sign = 0.0
        elif pivot < 0.0:
            sign = -sign
        for i in range(k + 1, n):
            share = matrix[i, k] / pivot
            matrix[i, k] = share
            for j in range(k + 1, n):
                matrix[i, j] -= share * matrix[k, j]
    return sign


@exact
def substitute(matrix: Any, pivots: Any, x: Any) -> None:
    """Solve with what `factor` left, in place; NaN or Inf where a pivot vanishes."""
    n = len(pivots)
    for k in range(n):
        best = pivots[k]
        x[k], x[best] = x[best], x[k]
    for k in range(n):
        for j in range(k):
            x[k] -= matrix[k, j] * x[j]
    for k in range(n - 1, -1, -1):
        for j in range(k + 1, n):
            x[k] -= matrix[k, j] * x[j]
        x[k] /= matrix[k, k]
