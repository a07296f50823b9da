#include "row_solver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "elimination.h"

namespace implicit_attention {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kNewtonSteps = 8, kDampedSteps = 20;
constexpr double kFine = 1e-12;  // residual at which a root is found

// The larger; NaN counts as larger than all, so that no comparison hides it.
double worse(double a, double b) { return !(a <= b) ? a : b; }

// out = matrix (1, p)
void multiply(const double* matrix, const double* p, int64_t n, double* out) {
  for (int64_t i = 0; i <= n; ++i) {
    out[i] = matrix[i * (n + 1)];
    for (int64_t j = 0; j < n; ++j) out[i] += matrix[i * (n + 1) + j + 1] * p[j];
  }
}

// half . (1, p)
double along(const double* half, const double* p, int64_t n) {
  double total = half[0];
  for (int64_t i = 0; i < n; ++i) total += half[i + 1] * p[i];
  return total;
}

}  // namespace

RowSolver::RowSolver(int64_t heads, int64_t grams)
    : n_(heads), grams_(grams), alpha_(heads), beta_(heads * heads), offset_(heads),
      gram_(grams * (heads + 1) * (heads + 1)), target_(heads), weight_(heads), slope_(heads * heads),
      half_(heads + 1), step_(heads + 1), trial_(heads + 1), start_(heads + 1), first_(heads + 1), second_(heads + 1),
      turn_(heads + 1), matrix_((heads + 1) * (heads + 1)), pivots_(heads + 1) {}

// Fill target_ = sigmoid(score(p) + offset), weight_, the sigmoid's slope, and slope_, the scores' Jacobian; returns the
// residual.
double RowSolver::evaluate(const double* p) {
  double worst = 0.0;
  for (int64_t h = 0; h < n_; ++h) {
    double top = alpha_[h], inverse = 1.0;
    for (int64_t j = 0; j < n_; ++j) top += beta_[h * n_ + j] * p[j];
    if (grams_ > 0) {
      const int64_t shared = n_ / grams_;
      if (h % shared == 0) multiply(gram(h / shared), p, n_, half_.data());
      inverse = 1.0 / std::sqrt(along(half_.data(), p, n_));
    }
    const double score = top * inverse, z = score + offset_[h], e = std::exp(-std::abs(z));
    target_[h] = (z >= 0.0 ? 1.0 : e) / (1.0 + e);
    weight_[h] = e / ((1.0 + e) * (1.0 + e));
    for (int64_t j = 0; j < n_; ++j) {
      const double by_norm = grams_ > 0 ? score * inverse * half_[j + 1] : 0.0;
      slope_[h * n_ + j] = (beta_[h * n_ + j] - by_norm) * inverse;
    }
    worst = worse(std::abs(target_[h] - p[h]), worst);
  }
  return worst;
}

void RowSolver::scores(const double* p, double* out) {
  for (int64_t h = 0; h < n_; ++h) {
    out[h] = alpha_[h];
    for (int64_t j = 0; j < n_; ++j) out[h] += beta_[h * n_ + j] * p[j];
    if (grams_ == 0) continue;
    multiply(gram(h / (n_ / grams_)), p, n_, half_.data());
    out[h] /= std::sqrt(along(half_.data(), p, n_));
  }
}

// How far rounding alone may move the target at p, as `RowProblem.rounding` has it.
double RowSolver::rounding(const double* p) {
  evaluate(p);
  double worst = 0.0;
  for (int64_t h = 0; h < n_; ++h) {
    double size = std::abs(alpha_[h]), top = alpha_[h];
    for (int64_t j = 0; j < n_; ++j) {
      size += std::abs(beta_[h * n_ + j]) * p[j];
      top += beta_[h * n_ + j] * p[j];
    }
    if (grams_ > 0) {
      const double* matrix = gram(h / (n_ / grams_));
      std::copy(matrix, matrix + matrix_.size(), matrix_.begin());
      multiply(matrix_.data(), p, n_, half_.data());
      const double square = along(half_.data(), p, n_), inverse = 1.0 / std::sqrt(square);
      for (double& entry : matrix_) entry = std::abs(entry);
      multiply(matrix_.data(), p, n_, half_.data());
      size = size * inverse + 0.5 * std::abs(top) * inverse * along(half_.data(), p, n_) / square;
    }
    if (!std::isinf(offset_[h])) size += std::abs(offset_[h]);
    worst = std::max(worst, size * weight_[h]);
  }
  return kEps * (1.0 + worst);
}

// Solve (I - Jacobian) step = target - p with what `evaluate` left; returns the determinant's sign.
double RowSolver::newton_step(const double* p, double* step) {
  for (int64_t i = 0; i < n_; ++i) {
    for (int64_t j = 0; j < n_; ++j) matrix_[i * n_ + j] = (i == j ? 1.0 : 0.0) - weight_[i] * slope_[i * n_ + j];
    step[i] = target_[i] - p[i];
  }
  const double sign = factor(matrix_.data(), n_, pivots_.data());
  substitute(matrix_.data(), n_, pivots_.data(), step);
  return sign;
}

// Three of Picard's steps from p = 1, and Newton's where they contract; the residual, infinity where they do not.
double RowSolver::settle(double* p) {
  std::fill(p, p + n_, 1.0);
  double before = kInfinity;
  for (int t = 0; t < 3; ++t) {
    const double length = evaluate(p);
    if (t > 0 && !(length <= std::max(0.5 * before, kFine))) return kInfinity;
    before = length;
    std::copy(target_.begin(), target_.end(), p);
  }
  std::copy(p, p + n_, start_.begin());
  for (int t = 0; t < kNewtonSteps; ++t) {
    const double residual = evaluate(p);
    if (residual <= kFine) return residual;
    newton_step(p, step_.data());
    for (int64_t h = 0; h < n_; ++h) {
      p[h] = std::min(std::max(p[h] + step_[h], 0.0), 1.0);
      if (!(std::abs(p[h] - start_[h]) <= std::max(before, kFine))) return kInfinity;
    }
  }
  return evaluate(p);
}

// Newton from p = 1, each step at the first length at which the residual falls enough; the residual.
double RowSolver::damped(double* p) {
  std::fill(p, p + n_, 1.0);
  double size = evaluate(p);
  for (int t = 0; t < kDampedSteps && !(size <= kFine); ++t) {
    newton_step(p, step_.data());
    bool fell = false;
    for (double length : {1.0, 0.5, 0.25}) {
      for (int64_t h = 0; h < n_; ++h) trial_[h] = std::min(std::max(p[h] + length * step_[h], 0.0), 1.0);
      const double rest = evaluate(trial_.data());
      if (rest <= (1.0 - 0.25 * length) * size) {
        std::copy(trial_.begin(), trial_.begin() + n_, p);
        size = rest;
        fell = true;
        break;
      }
    }
    if (!fell) break;
  }
  return size;
}

// Whether it is within tolerance, or as good as rounding allows.
bool RowSolver::good(const double* p, double residual) {
  return residual <= kFine || (residual < kInfinity && residual <= rounding(p));
}

// One more of Newton's steps, if it does any good: callers may ask for more digits than kFine.
void RowSolver::polish(double* p) {
  const double residual = evaluate(p);
  newton_step(p, step_.data());
  for (int64_t h = 0; h < n_; ++h) trial_[h] = std::min(std::max(p[h] + step_[h], 0.0), 1.0);
  if (evaluate(trial_.data()) <= residual) std::copy(trial_.begin(), trial_.begin() + n_, p);
}

bool RowSolver::solve(double* p) {
  const bool one_linear = n_ == 1 && grams_ == 0;  // then the curve leads to the largest root, which is the one wanted
  const bool found =
      good(p, settle(p)) || (!one_linear && good(p, damped(p))) || follow_curves(p);
  if (found) polish(p);
  return found;
}

}  // namespace implicit_attention
