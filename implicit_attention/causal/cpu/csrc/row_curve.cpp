// The curve that leads from p = 1 to a root of a row's equation, whatever the weights: curve.py for one row, which says how
// it is followed and why.
#include <algorithm>
#include <cmath>

#include "elimination.h"
#include "row_solver.h"

namespace implicit_attention {

struct RowSolver::Pace {
  double nats, cosine, contraction, longest;
  int steps;
};

struct RowSolver::Point {
  std::vector<double> u, tangent, bend;  // (p, t), of length one, half the curvature; [H + 1] each

  explicit Point(int64_t n) : u(n + 1), tangent(n + 1), bend(n + 1) {}
};

namespace {

constexpr double kFirstStep = 0.05, kShortestStep = 1e-10;
constexpr int kLandingSteps = 20;
constexpr double kArrived = 1e-13, kNearEnough = 1e-10;

double worse(double a, double b) { return !(a <= b) ? a : b; }

// Whether t turns back within the step and may have passed 1 before: where its tangents cross.
bool peaks(double before, double rise, double after, double fall, double length) {
  if (!(rise > 0.0 && fall < 0.0)) return false;
  return before + rise * (after - before - fall * length) / (rise - fall) >= 1.0;
}

}  // namespace

bool RowSolver::follow_curves(double* p) {
  constexpr Pace kPaces[] = {{1.0, 0.8, 0.1, 0.5, 4000}, {0.1, 0.98, 0.02, 0.1, 20000}};  // brisk, careful
  for (const Pace& pace : kPaces)
    if (follow_curve(p, pace) && good(p, evaluate(p))) return true;
  return false;
}

// Follow the curve from p = 1 to its first arrival at t = 1; put the root there into p. Returns whether there is one.
bool RowSolver::follow_curve(double* p, const Pace& pace) {
  Point at(n_), next(n_);
  start_curve(at);
  double length = kFirstStep;
  for (int k = 0; k < pace.steps; ++k) {
    if (step(at, next, length, pace)) {
      if (next.u[n_] >= 1.0) return land(at, next, p, pace);
      std::swap(at, next);
    }
    if (!(length > kShortestStep)) return false;
  }
  return false;
}

void RowSolver::start_curve(Point& at) {
  std::fill(at.u.begin(), at.u.end(), 1.0);
  evaluate(at.u.data());
  double square = 1.0;
  for (int64_t i = 0; i < n_; ++i) {
    at.tangent[i] = target_[i] - 1.0;
    square += at.tangent[i] * at.tangent[i];
  }
  at.u[n_] = 0.0;
  at.tangent[n_] = 1.0;
  for (double& entry : at.tangent) entry /= std::sqrt(square);
}

// Predict the end of a step of h(p, t) = p - 1 + t (1 - target) by tangent and bend, factor the Jacobian there, with the
// tangent as its last row, and correct once. Returns the determinant's sign.
double RowSolver::predict(const Point& at, Point& next, double length) {
  const int64_t n = n_, m = n_ + 1;
  for (int64_t i = 0; i < m; ++i) next.u[i] = at.u[i] + length * (at.tangent[i] + length * at.bend[i]);
  const double t = next.u[n];
  evaluate(next.u.data());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      matrix_[i * m + j] = (i == j ? 1.0 : 0.0) - t * weight_[i] * slope_[i * n + j];
    matrix_[i * m + n] = 1.0 - target_[i];
    first_[i] = next.u[i] + t * (1.0 - target_[i]) - 1.0;
    next.tangent[i] = 0.0;
  }
  std::copy(at.tangent.begin(), at.tangent.end(), matrix_.begin() + n * m);
  first_[n] = 0.0;
  next.tangent[n] = 1.0;
  const double sign = factor(matrix_.data(), m, pivots_.data());
  substitute(matrix_.data(), m, pivots_.data(), first_.data());
  substitute(matrix_.data(), m, pivots_.data(), next.tangent.data());
  return sign;
}

// One step; returns whether it is to be taken. The length becomes that of the next try.
bool RowSolver::step(const Point& at, Point& next, double& length, const Pace& pace) {
  const int64_t n = n_, m = n_ + 1;
  const double sign = predict(at, next, length);
  double off = 0.0;  // how far the scores were off the prediction
  for (int64_t i = 0; i < n; ++i) {
    double change = 0.0;
    for (int64_t j = 0; j < n; ++j) change += slope_[i * n + j] * first_[j];
    off = worse(std::abs(change), off);
  }
  for (int64_t i = 0; i < m; ++i) next.u[i] -= first_[i];
  evaluate(next.u.data());
  for (int64_t i = 0; i < n; ++i) {
    const double missing = 1.0 - target_[i];
    double change = 0.0;
    for (int64_t j = 0; j < n; ++j) change += slope_[i * n + j] * next.tangent[j];
    second_[i] = next.u[i] + next.u[n] * missing - 1.0;
    turn_[i] = next.tangent[i] + missing * next.tangent[n] - next.u[n] * weight_[i] * change;
  }
  second_[n] = turn_[n] = 0.0;
  substitute(matrix_.data(), m, pivots_.data(), second_.data());
  substitute(matrix_.data(), m, pivots_.data(), turn_.data());
  double square = 0.0, largest_first = 0.0, largest_second = 0.0;
  for (int64_t i = 0; i < m; ++i) {
    next.u[i] -= second_[i];
    next.tangent[i] -= turn_[i];
    square += next.tangent[i] * next.tangent[i];
    largest_first = std::max(largest_first, std::abs(first_[i]));
    largest_second = std::max(largest_second, std::abs(second_[i]));
  }
  const double norm = std::sqrt(square);  // 1 / cosine: the product with the old tangent is 1
  for (int64_t i = 0; i < m; ++i) {
    next.tangent[i] /= norm;
    next.bend[i] = (next.tangent[i] - at.tangent[i]) / (2.0 * length);
  }
  const double bent = (norm - 1.0) / (1.0 / pace.cosine - 1.0);
  const double shrunk = largest_second / (largest_first + 1e-9) / pace.contraction;
  double doubt = std::max(off / pace.nats, std::max(bent, shrunk));
  if (!std::isfinite(off + bent + shrunk)) doubt = HUGE_VAL;
  const bool good = doubt <= 1.0 && sign > 0.0 &&
                    !peaks(at.u[n], at.tangent[n], next.u[n], next.tangent[n], length * norm);
  const double factor = std::min(std::max(1.0 / std::sqrt(2.0 * doubt), 0.25), 2.0);
  length = std::min(length * (good ? factor : std::min(factor, 0.5)), pace.longest);
  return good;
}

// Newton at t = 1, from where the last step crossed it; false where it wanders off the step.
bool RowSolver::land(const Point& before, const Point& after, double* p, const Pace& pace) {
  const double share = (1.0 - before.u[n_]) / (after.u[n_] - before.u[n_]);
  double span = 0.0, moved = HUGE_VAL, sign = 0.0;
  for (int64_t i = 0; i <= n_; ++i) span = std::max(span, std::abs(after.u[i] - before.u[i]));
  for (int64_t i = 0; i < n_; ++i) p[i] = start_[i] = before.u[i] + share * (after.u[i] - before.u[i]);
  for (int k = 0; k < kLandingSteps && moved > kArrived; ++k) {
    evaluate(p);
    sign = newton_step(p, step_.data());
    moved = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      p[i] += step_[i];
      moved = worse(std::abs(step_[i]), moved);
    }
  }
  double wandered = 0.0, changed = 0.0;
  scores(start_.data(), first_.data());
  scores(p, step_.data());
  for (int64_t i = 0; i < n_; ++i) {
    wandered = std::max(wandered, std::abs(p[i] - start_[i]));
    changed = std::max(changed, std::abs(step_[i] - first_[i]));
    p[i] = std::min(std::max(p[i], 0.0), 1.0);
  }
  return moved <= kNearEnough && wandered <= span && changed <= 4.0 * pace.nats && sign > 0.0;
}

}  // namespace implicit_attention
