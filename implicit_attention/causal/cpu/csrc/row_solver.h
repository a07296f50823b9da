// The equation that one row poses for the weights on its own column, in float64: `rows.solve_rows` for one row.
#pragma once

#include <cstdint>
#include <vector>

namespace implicit_attention {

// p = sigmoid(score(p) + offset) in H unknowns, where score(p) = (alpha + beta p) / rms(p), rms(p)^2 = (1, p)^T gram (1, p);
// without a gram matrix the score is linear. See row_problem.py.
class RowSolver {
 public:
  // `grams`: matrices, each for heads / grams heads; 0 for linear scores.
  RowSolver(int64_t heads, int64_t grams);

  double* alpha() { return alpha_.data(); }    // [H]
  double* beta() { return beta_.data(); }      // [H, H]
  double* offset() { return offset_.data(); }  // [H]
  double* gram(int64_t g) { return gram_.data() + g * (n_ + 1) * (n_ + 1); }  // [H + 1, H + 1]

  // Put the root that is wanted (see `rows.solve_rows`) into p [H]; returns whether the row is solved.
  bool solve(double* p);

 private:
  struct Pace;   // how boldly a curve is followed
  struct Point;  // of a curve

  double evaluate(const double* p);
  void scores(const double* p, double* out);
  double rounding(const double* p);
  double newton_step(const double* p, double* step);
  double settle(double* p);
  double damped(double* p);
  bool good(const double* p, double residual);
  void polish(double* p);

  bool follow_curves(double* p);
  bool follow_curve(double* p, const Pace& pace);
  void start_curve(Point& at);
  bool step(const Point& at, Point& next, double& length, const Pace& pace);
  double predict(const Point& at, Point& next, double length);
  bool land(const Point& before, const Point& after, double* p, const Pace& pace);

  int64_t n_, grams_;
  std::vector<double> alpha_, beta_, offset_, gram_;
  std::vector<double> target_, weight_, slope_, half_;              // what `evaluate` fills
  std::vector<double> step_, trial_, start_, first_, second_, turn_;  // vectors of the iterations
  std::vector<double> matrix_;                                      // [H + 1, H + 1]
  std::vector<int64_t> pivots_;
};

}  // namespace implicit_attention
