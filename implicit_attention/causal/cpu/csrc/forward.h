// The forward pass of one sample; README.md derives it.
//
// Rows are settled R at a time. What the query map makes of their values and of the attention before them is computed once,
// by head; outputs are combinations of those, so a sweep needs no product with Omega_Q.
#pragma once

#include <algorithm>

#include "forward_scratch.h"
#include "threads.h"

namespace implicit_attention::CAPABILITY {

constexpr int kForwardSweeps = 32;
constexpr int kPatience = 8;  // sweeps after which rows that still settle slowly have their own equations solved

enum class Verdict { lost = -1, open = 0, settled = 1 };

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
  void begin(int64_t g, int64_t s, int64_t m);
  T norm_and_turn(T* q, int64_t i);
  void combine(int64_t g, int64_t k, int64_t m, Iterate<T>& at, T* q);
  void sweep(int64_t g, int64_t s, int64_t m, Iterate<T>& at);
  void weigh(int64_t s, int64_t i, Iterate<T>& at, Iterate<T>& next);
  void pack(int64_t i, Iterate<T>& next);
  void compare(int64_t h, int64_t s, int64_t m, Iterate<T>& at, Iterate<T>& next);
  Verdict within(const T* errors, const T* sizes, int64_t stride, int64_t m);
  T largest_of(const T* array, int64_t m);
  bool settles_slowly(T worst, T pace, int64_t m);
  void write(int64_t g, int64_t s, int64_t m);
  void report(int64_t s, int64_t m, int sweeps);

  bool own_root(int64_t s, int64_t i, Iterate<T>& next);
  void own_equation(int64_t g, int64_t s, int64_t i, Iterate<T>& next);
  void move(int64_t i, Iterate<T>& next);
  Verdict repair(int64_t s, int64_t m, Iterate<T>& next, bool all_rows);

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
  for (int64_t g = 0; g < z.groups; ++g) begin(g, s, m);

  bool slow = false;
  T before = kInfinity<T>;
  for (int sweeps = 1; sweeps <= kForwardSweeps; ++sweeps) {
    Iterate<T>&at = sweeps % 2 ? t.even : t.odd, &next = sweeps % 2 ? t.odd : t.even;
    for (int64_t g = 0; g < z.groups; ++g) sweep(g, s, m, at);
    for (int64_t i = 0; i < m; ++i) weigh(s, i, at, next);
    Verdict verdict = within(t.bounds, t.reach, z.hvec, m);
    if (verdict == Verdict::lost) return false;
    if (verdict == Verdict::settled || sweeps > kPatience) {
      for (int64_t h = 0; h < z.heads; ++h) compare(h, s, m, at, next);
      verdict = within(t.errors, t.sizes, z.heads, m);
    }
    const T worst = largest_of(t.bounds, m);
    slow = slow || (sweeps > kPatience && settles_slowly(worst, worst / before, m));
    before = worst;
    const bool done = verdict == Verdict::settled;
    if (a.own_score == nullptr && verdict != Verdict::lost && (done || slow || sweeps == 1)) {
      const Verdict roots = repair(s, m, next, slow && !done);
      if (done || slow) verdict = std::min(verdict, roots);
    }
    if (verdict == Verdict::lost) return false;
    if (verdict == Verdict::settled) {
      for (int64_t g = 0; g < z.groups; ++g) write(g, s, m);
      report(s, m, sweeps);
      return true;
    }
  }
  return false;
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

// The first iterate: attention before the rows. And scores of the own columns at y = v.
template <class T>
void ForwardSample<T>::begin(int64_t g, int64_t s, int64_t m) {
  T* q = t.queries + g * R * z.padded;
  T value_size[R];
  for (int64_t j = 0; j < m; ++j) value_size[j] = largest_modulus(value_rows(g, s + j), z.dim);
  for (int64_t i = 0; i < m; ++i) {
    if (a.own_score == nullptr) {
      copy(q, t.fixed + (g * R + i) * z.padded, z.padded);
      for (int64_t h = 0; h < z.heads; ++h)
        add(q, made_value(g, i) + h * z.padded, keep_of(h, s + i, s + i), z.padded);
      norm_and_turn(q, s + i);
    }
    heads_of(g, [&](int64_t h) {
      const int64_t at = i * z.hvec + h;
      const T score = a.own_score == nullptr ? dot(key_row(h, s + i), q, z.dim)
                                             : a.own_score[(b * z.heads + h) * z.length + row_of(s + i)];
      t.start[at] = score + own_bias(h, s + i);
      const bool sees = lse_of(h, s + i) != -kInfinity<T>;
      t.even.shares[at] = t.even.share[i * z.heads + h] = sees;
      t.reach[at] = largest_modulus(before_row(h, s + i), z.dim);
      for (int64_t j = 0; j < R; ++j) {
        const T keep = j <= i ? keep_of(h, s + i, s + j) : T(0), p = j == i && !sees;
        t.factors[(i * R + j) * z.hvec + h] = keep;
        t.even.weights[(i * R + j) * z.hvec + h] = p;
        t.even.mix[(i * R + j) * z.heads + h] = p * keep;
        t.reaches[(i * R + j) * z.hvec + h] = j <= i ? keep * value_size[j] : T(0);
      }
    });
  }
}

// Norm and rotate one query in place; returns what the norm multiplied it with.
template <class T>
T ForwardSample<T>::norm_and_turn(T* q, int64_t i) {
  T inverse = 1;
  if (a.inverse != nullptr) {
    inverse = 1 / std::sqrt(dot(q, q, z.dim) / T(z.dim) + T(a.eps));
    scale(q, inverse, z.dim);
    for (int64_t k = 0; a.norm_weight != nullptr && k < z.dim; ++k) q[k] *= a.norm_weight[k];
  }
  if (a.cosine != nullptr) {
    const int64_t at = b * a.turn_b + row_of(i) * (z.dim / 2);
    turn(q, a.cosine + at, a.sine + at, z.dim / 2);
  }
  return inverse;
}

// One vector of columns of a group's queries, before norm and rotation: the combination that the iterate says.
template <class T>
inline void ForwardSample<T>::combine(int64_t g, int64_t k, int64_t m, Iterate<T>& at, T* q) {
  const T *of_value = made_value(g, 0) + k, *of_before = made_before(g, 0) + k;
  Vector<T> total[R];
  for (int64_t i = 0; i < R; ++i) total[i] = load(t.fixed + (g * R + i) * z.padded + k);
  for (int64_t j = 0; j < m * z.heads; ++j) {
    const Vector<T> made = load(of_value + j * z.padded);
    for (int64_t i = 0; i < R; ++i) total[i] += at.mix[i * R * z.heads + j] * made;
  }
  for (int64_t h = 0; h < z.heads; ++h)
    for (int64_t i = 0; i < R; ++i) total[i] += at.share[i * z.heads + h] * load(of_before + (i * z.heads + h) * z.padded);
  for (int64_t i = 0; i < R; ++i) store(q + i * z.padded, total[i]);
}

// Make a group's queries at an iterate, and the scores of the rows on each other.
template <class T>
void ForwardSample<T>::sweep(int64_t g, int64_t s, int64_t m, Iterate<T>& at) {
  T* q = t.queries + g * R * z.padded;
  for (int64_t k = 0; k < z.padded; k += kLanes<T>) combine(g, k, m, at, q + k);
  for (int64_t i = 0; i < m; ++i) t.norms[g * R + i] = norm_and_turn(q + i * z.padded, s + i);
  heads_of(g, [&](int64_t h) {
    const T* queries[] = {q, q + z.padded, q + 2 * z.padded, q + 3 * z.padded};
    for (int64_t i = 0; i < m; ++i) {
      T scores[R];
      dots<R>(key_row(h, s + i), queries, z.dim, scores);
      for (int64_t j = 0; a.bias != nullptr && j <= i; ++j) scores[j] += bias_row(h, s + i)[s + j];
      if (a.own_score != nullptr) scores[i] = t.start[i * z.hvec + h];
      for (int64_t j = 0; j <= i; ++j) t.pairs[(i * R + j) * z.hvec + h] = scores[j];
    }
  });
}

}  // namespace implicit_attention::CAPABILITY
