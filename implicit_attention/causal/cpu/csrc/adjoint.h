// The adjoint of one sample, `lam = g + J^T lam`, from the last row to the first; README.md derives it.
//
// R rows at a time get what solved rows give them, then what they give each other (`adjoint_substitution.h`).
#pragma once

#include <algorithm>

#include "adjoint_scratch.h"
#include "threads.h"

namespace implicit_attention::CAPABILITY {

constexpr int kRefinements = 8;
constexpr double kStalled = 0.5;  // ratio of residuals at which only rounding is left

template <class T>
class AdjointSample {
 public:
  // `weight`: Omega_Q as [H, padded / panel (of y), G d (of q), panel (of y)].
  AdjointSample(const AdjointArguments<T>& a, const Sizes<T>& z, const T* weight, AdjointScratch<T>& t, Team team,
                int64_t b)
      : a(a), z(z), weight(weight), t(t), team(team), b(b), size(z.groups * z.dim) {}

  // Solve the rows; returns whether all are.
  bool solve() {
    T worst = 0;
    int64_t most = 0;
    team.each(z.groups, [&](int64_t g) { take_queries(g); });
    for (block = (z.n - 1) / kBlock * kBlock; block >= 0; block -= kBlock) {
      count = std::min(kBlock, z.n - block);
      team.each(z.groups, [&](int64_t g) { heads_of(g, [&](int64_t h) { take_block(h); }); });
      for (int64_t s = (count - 1) / R * R; s >= 0; s -= R) {
        const Settled found = solve_rows(s, std::min(R, count - s));
        if (found.sweeps == 0) return false;
        worst = std::max(worst, found.residual);
        most = std::max(most, found.sweeps);
      }
      team.each(z.groups, [&](int64_t g) { give_block(g); });
    }
    team.each(z.groups, [&](int64_t g) { give_values(g); });
    a.residual[b] = worst;
    a.sweeps[b] = most;
    return true;
  }

 private:
  struct Settled {
    int64_t sweeps;  // 0: not solved
    T residual;
  };

  template <class F>
  void heads_of(int64_t g, F f) {
    for (int64_t h = g * z.shared; h < (g + 1) * z.shared; ++h) f(h);
  }

  // Rows and columns of a block are counted from its start.
  int64_t row_of(int64_t i) const { return z.first + block + i; }
  T* of_row(T* array, int64_t g, int64_t i) const { return array + (g * z.rows + block + i) * z.padded; }
  T* of_block(T* array, int64_t h, int64_t i) const { return array + (h * (kBlock + R) + i) * z.padded; }
  T* of_four(T* array, int64_t h, int64_t i) const { return array + (h * R + i) * z.padded; }
  T* slopes_of(int64_t h, int64_t j) const { return t.slopes + (h * (kBlock + R) + j) * kBlock; }
  const T* y_row(int64_t h, int64_t i) const { return a.y + ((b * z.length + row_of(i)) * z.heads + h) * z.dim; }
  const T* grad_row(int64_t h, int64_t i) const { return a.grad + b * a.grad_b + row_of(i) * a.grad_n + h * a.grad_h; }
  const T* value_row(int64_t g, int64_t i) const {
    return a.value + b * a.value_b + g * a.value_g + row_of(i) * a.value_n;
  }
  // Of a row of this block and any column of the call.
  T bias_of(int64_t h, int64_t i, int64_t column) const {
    return a.bias == nullptr ? T(0) : a.bias[b * a.bias_b + h * a.bias_h + (block + i) * z.n + column];
  }
  T keep_of(int64_t h, int64_t i, int64_t column) const {
    return a.keep == nullptr ? T(1) : a.keep[((b * z.heads + h) * z.n + block + i) * z.n + column];
  }

  void take_queries(int64_t g);
  void take_block(int64_t h);
  void give_block(int64_t g);
  void give_values(int64_t g);
  void carry(int64_t g, int64_t h, int64_t columns);
  void linearize(int64_t h, int64_t column, int64_t from, T* weight, T* slope);

  Settled solve_rows(int64_t s, int64_t m);
  void begin(int64_t g, int64_t s, int64_t m);
  void attended_later(int64_t g, int64_t h, int64_t s);
  void weigh_each_other(int64_t g, int64_t h, int64_t s, int64_t m);
  T residual(int64_t s, int64_t m);
  void push(int64_t h, int64_t s, int64_t m);
  T pull(int64_t h, int64_t s, int64_t i, const T* lam, T* slopes);
  void gather(int64_t g, int64_t s, int64_t m);
  void finish(int64_t g, int64_t s, int64_t m);
  void before_map(int64_t g, int64_t i, T* q);

  T* made_row(int64_t g, int64_t i) const { return t.made + i * size + g * z.dim; }
  T* through_row(int64_t h, int64_t pair) const { return t.through + (h * kPairs + pair) * z.padded; }
  T* ascent_rows(int64_t into, int64_t pair) const { return t.ascent + (into * kPairs + pair) * z.heads * z.padded; }
  void prepare(int64_t s, int64_t m);
  void ascend(int64_t g, int64_t s, int64_t m);
  void factor_own(int64_t i, int64_t row);
  bool suspicious(const double* factors, const int64_t* pivots);
  T substitute(int64_t s, int64_t m);
  T substitute_row(int64_t s, int64_t i);

  const AdjointArguments<T>& a;
  const Sizes<T>& z;
  const T* weight;
  AdjointScratch<T>& t;
  const Team team;
  const int64_t b, size;
  int64_t block = 0, count = 0;  // the block at work: its first row and its rows
};

template <class T>
void AdjointSample<T>::take_queries(int64_t g) {
  for (int64_t i = 0; i < z.n; ++i) {
    const int64_t at = ((b * z.length + z.first + i) * z.groups + g) * z.dim;
    copy(t.queries + (g * z.rows + i) * z.padded, a.query + at, z.dim);
    copy(t.d_query + (g * z.rows + i) * z.padded, a.later + at, z.dim);
    zero(t.d_value + (g * z.rows + i) * z.padded, z.padded);
  }
}

template <class T>
void AdjointSample<T>::take_block(int64_t h) {
  T* columns = t.keys_t + h * z.dim * kBlock;
  for (int64_t i = 0; i < count; ++i) {
    const T* source = a.key + b * a.key_b + h * a.key_h + row_of(i) * a.key_n;
    T* key = of_block(t.keys, h, i);
    for (int64_t k = 0; k < z.dim; ++k) columns[k * kBlock + i] = key[k] = source[k] * T(a.scale);
    const T lse = a.lse[(b * z.heads + h) * z.length + row_of(i)];
    t.seen[h * kBlock + i] = lse == -kInfinity<T> ? T(0) : lse;
  }
  zero(t.d_key + h * kBlock * z.padded, kBlock * z.padded);
}

// Hand over a block's key gradients; give earlier columns what they get from it.
template <class T>
void AdjointSample<T>::give_block(int64_t g) {
  heads_of(g, [&](int64_t h) {
    T* d_key = t.d_key + h * kBlock * z.padded;
    for (int64_t s = 0; s < count; s += R) {
      const int64_t m = std::min(R, count - s);
      multiply<true>(Rows<T>{d_key + s * z.padded, z.padded}, Left<T>{slopes_of(h, 0) + s, 1, kBlock},
                     Right<T>{of_row(t.queries, g, 0), z.padded}, m, z.padded, s + m);
    }
    for (int64_t columns = 0; columns < block; columns += kBlock) carry(g, h, columns);
    for (int64_t i = 0; i < count; ++i) {
      T* out = a.d_key + ((b * z.heads + h) * z.n + block + i) * z.dim;
      for (int64_t k = 0; k < z.dim; ++k) out[k] = d_key[i * z.padded + k] * T(a.scale);
    }
    for (int64_t i = 0; a.slope != nullptr && i < count; ++i) {
      T* out = a.slope + ((b * z.heads + h) * z.n + block + i) * z.n + block;
      for (int64_t j = 0; j < i; ++j) out[j] = slopes_of(h, j)[i];
      out[i] = a.own_slope[(b * z.heads + h) * z.n + block + i];
    }
  });
}

// From a solved block to kBlock earlier columns, in one head.
template <class T>
void AdjointSample<T>::carry(int64_t g, int64_t h, int64_t columns) {
  T *weights = t.far_weights + g * kBlock * kBlock, *slopes = t.far_slopes + g * kBlock * kBlock;
  const int64_t at = (g * z.rows + columns) * z.padded, width = round_up<T>(count);
  const T* value = a.value + b * a.value_b + g * a.value_g + (z.first + columns) * a.value_n;
  multiply(Rows<T>{weights, kBlock}, Left<T>{t.queries + at, z.padded},
           Right<T>{t.keys_t + h * z.dim * kBlock, kBlock}, kBlock, width, z.dim);
  multiply(Rows<T>{slopes, kBlock}, Left<T>{value, a.value_n}, Right<T>{t.lams_t + h * z.dim * kBlock, kBlock},
           kBlock, width, z.dim);
  for (int64_t j = 0; j < kBlock; ++j) {
    linearize(h, columns + j, 0, weights + j * kBlock, slopes + j * kBlock);
    for (int64_t i = 0; a.slope != nullptr && i < count; ++i)
      a.slope[((b * z.heads + h) * z.n + block + i) * z.n + columns + j] = slopes[j * kBlock + i];
  }
  multiply<true>(Rows<T>{t.d_query + at, z.padded}, Left<T>{slopes, kBlock},
                 Right<T>{of_block(t.keys, h, 0), z.padded}, kBlock, z.padded, count);
  multiply<true>(Rows<T>{t.d_value + at, z.padded}, Left<T>{weights, kBlock},
                 Right<T>{of_block(t.lams, h, 0), z.padded}, kBlock, z.padded, count);
  multiply<true>(Rows<T>{t.d_key + h * kBlock * z.padded, z.padded}, Left<T>{slopes, 1, kBlock},
                 Right<T>{t.queries + at, z.padded}, count, z.padded, kBlock);
}

// Turn scores of the block's rows on a column, and lam . v, into weights (times dropout factors) and cotangents of scores,
// for the rows from `from` on. Entries are worked on by whole vectors, so some before and after those are written, too.
template <class T>
void AdjointSample<T>::linearize(int64_t h, int64_t column, int64_t from, T* weight, T* slope) {
  const T *seen = t.seen + h * kBlock, *along = t.along + h * kBlock;
  for (int64_t i = from; a.bias != nullptr && i < count; ++i) weight[i] += bias_of(h, i, column);
  for (int64_t i = from; a.keep != nullptr && i < count; ++i) slope[i] *= keep_of(h, i, column);
  for (int64_t i = from - from % kLanes<T>; i < count; i += kLanes<T>) {
    const Vector<T> p = exponential(load(weight + i) - load(seen + i));
    store(weight + i, p);
    store(slope + i, p * (load(slope + i) - load(along + i)));
  }
  for (int64_t i = from; a.keep != nullptr && i < count; ++i) weight[i] *= keep_of(h, i, column);
}

template <class T>
void AdjointSample<T>::give_values(int64_t g) {
  for (int64_t i = 0; i < z.n; ++i)
    copy(a.d_value + ((b * z.groups + g) * z.n + i) * z.dim, t.d_value + (g * z.rows + i) * z.padded, z.dim);
}

template <class T>
typename AdjointSample<T>::Settled AdjointSample<T>::solve_rows(int64_t s, int64_t m) {
  const T allowed = a.allowed[b];
  team.each(z.groups, [&](int64_t g) { begin(g, s, m); });
  prepare(s, m);
  T error = residual(s, m), before = kInfinity<T>;
  Settled found{0, substitute(s, m)};
  if (found.residual <= allowed) found.sweeps = 1;
  for (int sweep = 2; found.sweeps == 0 && sweep <= kRefinements; ++sweep) {
    for (int64_t g = 0; g < z.groups; ++g) gather(g, s, m);
    error = residual(s, m);
    if (!(error < kInfinity<T>)) break;
    // Within tolerance; or nothing but rounding is left.
    if (error <= allowed || !(error < T(kStalled) * before))
      found = {sweep, error};
    else
      substitute(s, m);
    before = error;
  }
  if (found.sweeps > 0) team.each(z.groups, [&](int64_t g) { finish(g, s, m); });
  return found;
}

// What later rows give the queries, and so Omega_Q; the rows' weights on each other; lam = 0.
template <class T>
void AdjointSample<T>::begin(int64_t g, int64_t s, int64_t m) {
  heads_of(g, [&](int64_t h) {
    if (s + m < count) {
      attended_later(g, h, s);
      multiply<true>(Rows<T>{of_row(t.d_query, g, s), z.padded}, Left<T>{slopes_of(h, s) + s + m, kBlock},
                     Right<T>{of_block(t.keys, h, s + m), z.padded}, m, z.padded, count - s - m);
    }
    weigh_each_other(g, h, s, m);
    zero(of_four(t.now, h, 0), R * z.padded);
    for (int64_t i = 0; i < m; ++i) {
      t.along[h * kBlock + s + i] = 0;
      for (int64_t j = 0; j <= i; ++j) slopes_of(h, s + j)[s + i] = 0;
    }
  });
  for (int64_t j = 0; j < R; ++j) {
    zero(made_row(g, j), z.dim);
    if (j < m) {
      copy(made_row(g, j), of_row(t.d_query, g, s + j), z.dim);
      before_map(g, s + j, made_row(g, j));
    }
  }
}

template <class T>
void AdjointSample<T>::weigh_each_other(int64_t g, int64_t h, int64_t s, int64_t m) {
  T* pairs = t.pairs + h * R * R;
  for (int64_t i = 0; i < R; ++i) {
    const T* queries[] = {of_row(t.queries, g, s), of_row(t.queries, g, s + 1), of_row(t.queries, g, s + 2),
                          of_row(t.queries, g, s + 3)};
    T* row = pairs + i * R;
    dots<R>(of_block(t.keys, h, s + i), queries, z.dim, row);
    for (int64_t j = 0; j < R; ++j) {
      if (i >= m || j > i) {
        row[j] = -kInfinity<T>;
        continue;
      }
      if (j == i && a.own_score != nullptr) row[j] = a.own_score[(b * z.heads + h) * z.length + row_of(s + i)];
      row[j] += bias_of(h, s + i, block + s + j) - t.seen[h * kBlock + s + i];
    }
  }
  for (int64_t i = 0; i < R * R; i += kLanes<T>) store(pairs + i, exponential(load(pairs + i)));
}

// Weights and slopes of the block's rows after these, which are solved, on these columns.
template <class T>
void AdjointSample<T>::attended_later(int64_t g, int64_t h, int64_t s) {
  T *weights = t.weights + h * R * kBlock, *slopes = slopes_of(h, s);
  const int64_t from = (s + R) / kLanes<T> * kLanes<T>, width = round_up<T>(count) - from;
  multiply(Rows<T>{weights + from, kBlock}, Left<T>{of_row(t.queries, g, s), z.padded},
           Right<T>{t.keys_t + h * z.dim * kBlock + from, kBlock}, R, width, z.dim);
  multiply(Rows<T>{slopes + from, kBlock}, Left<T>{value_row(g, s), a.value_n},
           Right<T>{t.lams_t + h * z.dim * kBlock + from, kBlock}, R, width, z.dim);
  for (int64_t j = 0; j < R; ++j) linearize(h, block + s + j, s + R, weights + j * kBlock, slopes + j * kBlock);
}

// How a row's lam moves its scores on the rows up to itself; returns lam . y.
template <class T>
inline T AdjointSample<T>::pull(int64_t h, int64_t s, int64_t i, const T* lam, T* slopes) {
  const int64_t g = h / z.shared;
  const T* others[] = {value_row(g, s), value_row(g, s + std::min<int64_t>(i, 1)),
                       value_row(g, s + std::min<int64_t>(i, 2)), value_row(g, s + i), y_row(h, s + i)};
  T products[R + 1];
  dots<R + 1>(lam, others, z.dim, products);
  for (int64_t j = 0; j <= i; ++j)
    slopes[j] = t.pairs[(h * R + i) * R + j] * (keep_of(h, s + i, block + s + j) * products[j] - products[R]);
  return products[R];
}

// From the rows' lam to the cotangent of what Omega_Q made.
template <class T>
void AdjointSample<T>::gather(int64_t g, int64_t s, int64_t m) {
  for (int64_t j = 0; j < m; ++j) copy(made_row(g, j), of_row(t.d_query, g, s + j), z.dim);
  heads_of(g, [&](int64_t h) {
    for (int64_t i = 0; i < m; ++i) {
      T slopes[R];
      t.along[h * kBlock + s + i] = pull(h, s, i, of_four(t.now, h, i), slopes);
      for (int64_t j = 0; j <= i; ++j) {
        slopes_of(h, s + j)[s + i] = slopes[j];
        if (j < i || a.own_score == nullptr) add(made_row(g, j), of_block(t.keys, h, s + i), slopes[j], z.dim);
      }
    }
  });
  for (int64_t j = 0; j < m; ++j) before_map(g, s + j, made_row(g, j));
}

// g + J^T lam - lam, into `out`; its largest entry.
template <class T>
T AdjointSample<T>::residual(int64_t s, int64_t m) {
  team.each(z.heads, [&](int64_t h) { push(h, s, m); });
  T worst = 0;
  for (int64_t h = 0; h < z.heads; ++h) worst = larger<T>(worst, t.errors[h]);
  return worst;
}

template <class T>
void AdjointSample<T>::push(int64_t h, int64_t s, int64_t m) {
  if (weight == nullptr) {
    for (int64_t j = 0; j < m; ++j) copy<T>(of_four(t.out, h, j), t.made + j * size, z.dim);
  } else {
    multiply(Rows<T>{of_four(t.out, h, 0), z.padded}, Left<T>{t.made, size},
             Right<T>{weight + h * size * z.padded, kPanel<T>, size * kPanel<T>}, R, z.padded, size);
  }
  T worst = 0;
  for (int64_t j = 0; j < m; ++j) {
    T *row = of_four(t.out, h, j), *now = of_four(t.now, h, j);
    const T* grad = grad_row(h, s + j);
    for (int64_t k = 0; k < z.dim; ++k) row[k] += grad[k] - now[k];
    worst = larger(worst, largest_modulus(row, z.dim));
  }
  t.errors[h] = worst;
}

// Turn the cotangent of a row's query into that of the linear map's output, in place.
template <class T>
void AdjointSample<T>::before_map(int64_t g, int64_t i, T* q) {
  const int64_t at = (b * z.length + row_of(i)) * z.groups + g, turn_at = b * a.turn_b + row_of(i) * (z.dim / 2);
  const T *query = of_row(t.queries, g, i), *normed = a.norm_weight == nullptr ? query : a.normed + at * z.dim;
  const T along = a.inverse == nullptr ? T(0) : dot<T>(q, query, z.dim) / T(z.dim);  // a rotation does not change it
  const auto through_norm = [&] {
    const T inverse = a.inverse[at];
    for (int64_t k = 0; k < z.dim; ++k) q[k] = (q[k] - along * normed[k]) * inverse;
  };
  if (a.inverse != nullptr && a.norm_weight == nullptr) through_norm();
  if (a.cosine != nullptr) turn_back(q, a.cosine + turn_at, a.sine + turn_at, z.dim / 2);
  if (a.norm_weight == nullptr) return;
  for (int64_t k = 0; k < z.dim; ++k) q[k] *= a.norm_weight[k];
  through_norm();
}

// Hand over lam and what Omega_Q's output gets; keep what earlier rows need.
template <class T>
void AdjointSample<T>::finish(int64_t g, int64_t s, int64_t m) {
  for (int64_t j = 0; j < m; ++j)
    copy<T>(a.made + (b * z.n + block + s + j) * size + g * z.dim, t.made + j * size + g * z.dim, z.dim);
  heads_of(g, [&](int64_t h) {
    T *columns = t.lams_t + h * z.dim * kBlock + s, *weights = t.weights + h * R * kBlock + s;
    for (int64_t i = 0; i < m; ++i) {
      const T* now = of_four(t.now, h, i);
      copy(of_block(t.lams, h, s + i), now, z.dim);
      copy(a.lam + ((b * z.n + block + s + i) * z.heads + h) * z.dim, now, z.dim);
      for (int64_t k = 0; k < z.dim; ++k) columns[k * kBlock + i] = now[k];
      a.own_slope[(b * z.heads + h) * z.n + block + s + i] = slopes_of(h, s + i)[s + i];
      for (int64_t j = 0; j < m; ++j) {
        const T p = j <= i ? t.pairs[(h * R + i) * R + j] * keep_of(h, s + i, block + s + j) : T(0);
        weights[j * kBlock + i] = p;
        if (j > i || (j == i && a.own_score != nullptr)) slopes_of(h, s + j)[s + i] = 0;  // nothing for keys and queries
      }
    }
    multiply<true>(Rows<T>{of_row(t.d_value, g, s), z.padded}, Left<T>{weights, kBlock},
                   Right<T>{of_block(t.lams, h, s), z.padded}, m, z.padded, count - s);
  });
}

}  // namespace implicit_attention::CAPABILITY
