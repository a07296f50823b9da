// Small systems of linear equations: Gaussian elimination with pivots.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

namespace implicit_attention {
namespace {  // one copy per file: files are compiled for different instruction sets

// Factor a matrix [n, n] in place; returns the sign of its determinant, 0 if a pivot vanishes.
double factor(double* matrix, int64_t n, int64_t* pivots) {
  double sign = 1.0;
  for (int64_t k = 0; k < n; ++k) {
    int64_t best = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::abs(matrix[i * n + k]) > std::abs(matrix[best * n + k])) best = i;
    pivots[k] = best;
    if (best != k) {
      sign = -sign;
      for (int64_t j = 0; j < n; ++j) std::swap(matrix[k * n + j], matrix[best * n + j]);
    }
    const double pivot = matrix[k * n + k];
    sign = pivot == 0.0 ? 0.0 : pivot < 0.0 ? -sign : sign;
    for (int64_t i = k + 1; i < n; ++i) {
      const double share = matrix[i * n + k] / pivot;
      matrix[i * n + k] = share;
      for (int64_t j = k + 1; j < n; ++j) matrix[i * n + j] -= share * matrix[k * n + j];
    }
  }
  return sign;
}

// Solve with what `factor` left, in place; NaN or Inf where a pivot vanishes.
void substitute(const double* matrix, int64_t n, const int64_t* pivots, double* x) {
  for (int64_t k = 0; k < n; ++k) std::swap(x[k], x[pivots[k]]);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = 0; j < k; ++j) x[k] -= matrix[k * n + j] * x[j];
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < n; ++j) x[k] -= matrix[k * n + j] * x[j];
    x[k] /= matrix[k * n + k];
  }
}

}  // namespace
}  // namespace implicit_attention
