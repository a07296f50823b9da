// Rows whose own weight is far from that at y = v: their own equations, within a sweep.
#pragma once

#include "forward_sweep.h"

namespace implicit_attention::CAPABILITY {

// Put all rows, or those whose own weight is far from that at y = v, at the roots of their own equations. Returns
// `settled` if all were there, `lost` if one cannot be solved.
template <class T>
Verdict ForwardSample<T>::repair(int64_t s, int64_t m, Iterate<T>& next, bool all_rows) {
  Verdict verdict = Verdict::settled;
  for (int64_t i = 0; i < m; ++i) {
    bool wanted = all_rows;
    for (int64_t h = 0; h < z.heads; ++h) wanted = wanted || !(t.changes[i * z.hvec + h] <= T(a.far));
    if (!wanted) continue;
    if (!own_root(s, i, next)) return Verdict::lost;
    double moved = 0;
    for (int64_t h = 0; h < z.heads; ++h)
      moved = std::max(moved, std::abs(t.root[h] - double(next.weights[(i * R + i) * z.hvec + h])));
    const bool elsewhere = moved > a.same_root;
    if (all_rows || elsewhere) move(i, next);
    if (elsewhere) verdict = Verdict::open;
  }
  return verdict;
}

// Solve a row's own equation, given what it attends to in other columns.
template <class T>
bool ForwardSample<T>::own_root(int64_t s, int64_t i, Iterate<T>& next) {
  for (int64_t g = 0; g < z.groups; ++g) own_equation(g, s, i, next);
  return t.solver.solve(t.root);
}

// A group's part of the equation: q(p) = q_0 + sum_h p_h q_h, put onto the row's keys.
template <class T>
void ForwardSample<T>::own_equation(int64_t g, int64_t s, int64_t i, Iterate<T>& next) {
  T* q = t.own;
  copy(q, t.fixed + (g * R + i) * z.padded, z.padded);
  for (int64_t h = 0; h < z.heads; ++h) {
    const int64_t at = i * z.hvec + h;
    const T scale_others = t.rest[at] == 0 ? T(0) : t.total[at] / t.rest[at];  // to weights without the own column
    T* others = q + (1 + h) * z.padded;
    zero(others, z.padded);
    add(others, made_before(g, i) + h * z.padded, scale_others * next.share[i * z.heads + h], z.padded);
    for (int64_t j = 0; j < i; ++j)
      add(others, made_value(g, j) + h * z.padded, scale_others * next.mix[(i * R + j) * z.heads + h], z.padded);
    add(q, others, T(1), z.padded);
    scale(others, T(-1), z.padded);
    add(others, made_value(g, i) + h * z.padded, t.factors[(i * R + i) * z.hvec + h], z.padded);
  }
  if (a.inverse != nullptr) {
    double* gram = t.solver.gram(g);
    const int64_t n = z.heads + 1;
    for (int64_t h = 0; h < n; ++h)
      for (int64_t j = 0; j <= h; ++j)
        gram[h * n + j] = gram[j * n + h] = dot(q + h * z.padded, q + j * z.padded, z.dim) / T(z.dim);
    gram[0] += a.eps;
  }
  T* key = q + (1 + z.heads) * z.padded;
  heads_of(g, [&](int64_t h) {
    const int64_t at = i * z.hvec + h;
    copy(key, key_row(h, s + i), z.dim);
    if (a.cosine != nullptr) {
      const int64_t turn = b * a.turn_b + row_of(s + i) * (z.dim / 2);
      turn_back(key, a.cosine + turn, a.sine + turn, z.dim / 2);
    }
    for (int64_t k = 0; a.norm_weight != nullptr && k < z.dim; ++k) key[k] *= a.norm_weight[k];
    t.solver.alpha()[h] = dot(key, q, z.dim);
    for (int64_t j = 0; j < z.heads; ++j) t.solver.beta()[h * z.heads + j] = dot(key, q + (1 + j) * z.padded, z.dim);
    const double bias = own_bias(h, s + i), rest = t.rest[at];
    t.solver.offset()[h] = bias == -kInfinity<double> ? bias
                           : rest == 0              ? kInfinity<double>
                                                    : bias - double(t.peak[at]) - std::log(rest);
  });
}

// Give a row of the next iterate the own weights that were found.
template <class T>
void ForwardSample<T>::move(int64_t i, Iterate<T>& next) {
  for (int64_t h = 0; h < z.heads; ++h) {
    const int64_t at = i * z.hvec + h;
    if (t.rest[at] == 0) continue;
    const T factor = T(1 - t.root[h]) * t.total[at] / t.rest[at];
    for (int64_t j = 0; j < i; ++j) next.weights[(i * R + j) * z.hvec + h] *= factor;
    next.weights[(i * R + i) * z.hvec + h] = T(t.root[h]);
    next.shares[at] *= factor;
  }
  pack(i, next);
}

}  // namespace implicit_attention::CAPABILITY
