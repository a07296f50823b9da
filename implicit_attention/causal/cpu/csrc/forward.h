// The forward pass of one sample; README.md derives it.
//
// What the query map makes of the values of R rows, and of the attention before them, is computed once, by head. Outputs
// are combinations of those, so a sweep over a row needs no product with Omega_Q (`forward_row.h`).
#pragma once

#include <algorithm>

#include "forward_scratch.h"
#include "threads.h"

namespace implicit_attention::CAPABILITY {

constexpr int kForwardSweeps = 32;
constexpr int kFiner = 8;  // gradients are off by the residual times the condition, and a sweep more costs little
template <class T>
constexpr T kRounding = 32 * std::numeric_limits<T>::epsilon();  // changes of weights below which none contracts any more
constexpr int kPatience = 8;  // sweeps after which a row that still settles slowly has its own equation solved

template <class T>
class ForwardSample {
 public:
  // `weight`: Omega_Q as [G, H, padded / panel (of q), d (of y), panel (of q)].
  ForwardSample(const ForwardArguments<T>& a, const Sizes<T>& z, const T* weight, ForwardScratch<T>& t, Team team,
                int64_t b)
      : a(a), z(z), weight(weight), t(t), team(team), b(b) {}

  // Settle the rows; returns how many are.
  int64_t solve() {
    team.each(z.groups, [&](int64_t g) { take_values(g); });
    for (int64_t block = 0; block < z.n; block += kBlock) {
      const int64_t count = std::min(kBlock, z.n - block);
      team.each(z.groups, [&](int64_t g) {
        for (int64_t h = g * z.shared; h < (g + 1) * z.shared; ++h) take_block(h, block, count);
      });
      for (int64_t s = block; s < block + count; s += R)
        if (!settle_rows(s, std::min(R, z.n - s))) return s;
    }
    return z.n;
  }

 private:
  // The loops of a group over its heads, and of all heads.
  template <class F>
  void heads_of(int64_t g, F f) {
    for (int64_t h = g * z.shared; h < (g + 1) * z.shared; ++h) f(h);
  }

  int64_t row_of(int64_t i) const { return z.first + i; }
  T* value_rows(int64_t g, int64_t i) { return t.values + (g * z.rows + i) * z.padded; }
  T* key_row(int64_t h, int64_t i) { return t.keys + (h * (kBlock + R) + i % kBlock) * z.padded; }
  T* before_row(int64_t h, int64_t i) { return t.before + (h * (kBlock + R) + i % kBlock) * z.padded; }
  T& lse_of(int64_t h, int64_t i) { return t.lse[(i % kBlock) * z.hvec + h]; }
  T* made_before(int64_t g, int64_t i) { return t.made + (g * 2 * R + i) * z.heads * z.padded; }
  T* made_value(int64_t g, int64_t i) { return made_before(g, R + i); }
  const T* bias_row(int64_t h, int64_t i) const { return a.bias + b * a.bias_b + h * a.bias_h + i * z.n; }
  T own_bias(int64_t h, int64_t i) const { return a.bias == nullptr ? T(0) : bias_row(h, i)[i]; }
  const T* keep_row(int64_t h, int64_t i) const { return a.keep + ((b * z.heads + h) * z.n + i) * z.n; }
  T keep_of(int64_t h, int64_t i, int64_t j) const { return a.keep == nullptr ? T(1) : keep_row(h, i)[j]; }

  void take_values(int64_t g);
  void take_block(int64_t h, int64_t block, int64_t count);
  void attend(int64_t h, int64_t i, int64_t count, int64_t from, int64_t to);
  T weigh_columns(int64_t h, int64_t i, int64_t from, int64_t to, T* scores);

  bool settle_rows(int64_t s, int64_t m);
  void make(int64_t g, int64_t s, int64_t m);
  void write(int64_t g, int64_t s, int64_t m);
  void report(int64_t s, int64_t m);

  T* own_row(int64_t g, int64_t h) const { return t.own + (g * (z.heads + 1) + h) * z.padded; }
  bool settle_row(int64_t s, int64_t i);
  void weigh_others(int64_t s, int64_t i);
  void combine_others(int64_t g, int64_t s, int64_t i);
  void evaluate(int64_t i, const T* p, T* next);
  T query_at(int64_t g, const T* p, T* q);
  bool iterate(int64_t s, int64_t i);
  void step(bool along);
  bool given(int64_t s, int64_t i);
  bool at_root();
  bool within(int64_t i, T residual);
  bool own_root(int64_t s, int64_t i);
  T norm_and_turn(T* q, int64_t i);
  void finish(int64_t s, int64_t i);

  const ForwardArguments<T>& a;
  const Sizes<T>& z;
  const T* weight;
  ForwardScratch<T>& t;
  const Team team;
  const int64_t b;
};

template <class T>
void ForwardSample<T>::take_values(int64_t g) {
  for (int64_t i = 0; i < z.n; ++i)
    copy(value_rows(g, i), a.value + b * a.value_b + g * a.value_g + row_of(i) * a.value_n, z.dim);
  zero(value_rows(g, z.n), R * z.padded);
}

// Keys of a block's rows, scaled, and what they attend to in all columns before the block.
template <class T>
void ForwardSample<T>::take_block(int64_t h, int64_t block, int64_t count) {
  for (int64_t i = block; i < block + count; ++i) {
    const T* key = a.key + b * a.key_b + h * a.key_h + row_of(i) * a.key_n;
    for (int64_t k = 0; k < z.dim; ++k) key_row(h, i)[k] = key[k] * T(a.scale);
    copy(before_row(h, i), a.y + ((b * z.length + row_of(i)) * z.heads + h) * z.dim, z.dim);
    lse_of(h, i) = a.lse[(b * z.heads + h) * z.length + row_of(i)];
  }
  zero(key_row(h, block) + count * z.padded, R * z.padded);
  zero(before_row(h, block) + count * z.padded, R * z.padded);
  for (int64_t i = block; block > 0 && i < block + count; i += kStrip)
    attend(h, i, std::min(kStrip, block + count - i), 0, block);
}

// Merge attention of some rows to the columns from .. to into what they saw before; `from` starts a block.
template <class T>
void ForwardSample<T>::attend(int64_t h, int64_t i, int64_t count, int64_t from, int64_t to) {
  const int64_t g = h / z.shared, width = z.blocks * kBlock;
  T* scores = t.scores + g * kStrip * width;
  T* out = t.attended + g * kStrip * z.padded;
  const int64_t rows = (count + R - 1) / R * R;  // keys are zero beyond the last row
  for (int64_t j = from; j < to; j += kBlock) {
    const T* columns = t.columns + (g * z.blocks + j / kBlock) * z.dim * kBlock;
    multiply(Rows<T>{scores + j - from, width}, Left<T>{key_row(h, i), z.padded}, Right<T>{columns, kBlock}, rows,
             std::min(kBlock, round_up<T>(to - j)), z.dim);
  }
  for (int64_t r = 0; r < count; ++r) scale(before_row(h, i + r), weigh_columns(h, i + r, from, to, scores + r * width), z.dim);
  for (int64_t r = count; r < rows; ++r) zero(scores + r * width, to - from);
  multiply(Rows<T>{out, z.padded}, Left<T>{scores, width}, Right<T>{value_rows(g, from), z.padded}, rows, z.padded,
           to - from);
  for (int64_t r = 0; r < count; ++r) add(before_row(h, i + r), out + r * z.padded, T(1), z.dim);
}

// Turn a row of scores into weights; returns the weight that is left to what the row saw before.
template <class T>
T ForwardSample<T>::weigh_columns(int64_t h, int64_t i, int64_t from, int64_t to, T* scores) {
  const int64_t count = to - from;
  if (a.bias != nullptr) add(scores, bias_row(h, i) + from, T(1), count);
  T& lse = lse_of(h, i);
  const T peak = largest_entry(scores, count, lse);
  if (peak == -kInfinity<T>) {
    zero(scores, count);
    return T(0);
  }
  const T old = exponential_of(lse - peak);
  const T total = exponentials(scores, count, peak) + old, inverse = 1 / total;
  if (a.keep == nullptr) {
    scale(scores, inverse, count);
  } else {
    const T* keep = keep_row(h, i) + from;
    for (int64_t j = 0; j < count; ++j) scores[j] *= inverse * keep[j];
  }
  lse = peak + std::log(total);
  return old * inverse;
}

template <class T>
bool ForwardSample<T>::settle_rows(int64_t s, int64_t m) {
  const int64_t block = s / kBlock * kBlock;
  if (s > block) {
    team.each(z.groups, [&](int64_t g) { heads_of(g, [&](int64_t h) { attend(h, s, m, block, s); }); });
  }
  team.each(z.groups, [&](int64_t g) { make(g, s, m); });
  for (int64_t i = 0; i < m; ++i)
    if (!settle_row(s, i)) return false;
  for (int64_t g = 0; g < z.groups; ++g) write(g, s, m);
  report(s, m);
  return true;
}

// What Omega_Q makes of each head's attention before the rows and of their values; the rest of the query.
template <class T>
void ForwardSample<T>::make(int64_t g, int64_t s, int64_t m) {
  const int64_t row = z.heads * z.padded;
  for (int64_t h = 0; h < z.heads; ++h) {
    const T *before = before_row(h, s), *value = value_rows(h / z.shared, s);
    T *of_before = made_before(g, 0) + h * z.padded, *of_value = made_value(g, 0) + h * z.padded;
    if (weight == nullptr) {  // one head
      copy(of_before, before, R * z.padded);
      copy(of_value, value, R * z.padded);
      continue;
    }
    const T* panel = weight + (g * z.heads + h) * z.dim * z.padded;
    for (int64_t j = 0; j < z.padded; j += kPanel<T>, panel += z.dim * kPanel<T>) {
      tile<R, 2, false>(Rows<T>{of_before + j, row}, Left<T>{before, z.padded}, Right<T>{panel, kPanel<T>}, z.dim);
      tile<R, 2, false>(Rows<T>{of_value + j, row}, Left<T>{value, z.padded}, Right<T>{panel, kPanel<T>}, z.dim);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    T* fixed = t.fixed + (g * R + i) * z.padded;
    zero(fixed, z.padded);
    if (a.constant != nullptr) add(fixed, a.constant + g * z.dim, T(1), z.dim);
    if (a.added != nullptr) add(fixed, a.added + ((b * z.length + row_of(s + i)) * z.groups + g) * z.dim, T(1), z.dim);
  }
}

// Hand over settled rows.
template <class T>
void ForwardSample<T>::write(int64_t g, int64_t s, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = row_of(s + i), at = (b * z.length + row) * z.groups + g;
    const T* q = t.queries + (g * R + i) * z.padded;
    copy(a.query + at * z.dim, q, z.dim);
    if (a.inverse != nullptr) a.inverse[at] = t.norms[g * R + i];
    T* column = t.columns + (g * z.blocks + (s + i) / kBlock) * z.dim * kBlock + (s + i) % kBlock;
    for (int64_t k = 0; k < z.dim; ++k) column[k * kBlock] = q[k];
    heads_of(g, [&](int64_t h) {
      T* y = a.y + ((b * z.length + row) * z.heads + h) * z.dim;
      T& lse = a.lse[(b * z.heads + h) * z.length + row];
      if (a.before_y != nullptr) {
        copy(a.before_y + ((b * z.n + s + i) * z.heads + h) * z.dim, y, z.dim);
        a.before_lse[(b * z.heads + h) * z.n + s + i] = lse;
      }
      copy(y, t.outputs + (h * R + i) * z.padded, z.dim);
      lse = t.whole[i * z.hvec + h];
    });
  }
}

template <class T>
void ForwardSample<T>::report(int64_t s, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = b * z.length + row_of(s + i);
    a.residual[at] = t.errors[i];
    a.size[at] = t.sizes[i];
    a.sweeps[at] = t.sweeps[i];
  }
}

}  // namespace implicit_attention::CAPABILITY
