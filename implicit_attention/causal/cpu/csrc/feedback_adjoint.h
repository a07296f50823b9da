// The adjoint of maps whose values read outputs, from the last row to the first: strips of kFew rows get what the later
// rows of the call give their columns by products of matrices, then its rows are solved one after the other.
#pragma once

#include "feedback.h"

namespace implicit_attention::CAPABILITY {

template <class T>
struct FeedbackAdjointScratch {
  // Of all rows of the call; `_t` as columns
  Buffer<T> keys, lams;      // [H, rows, padded]; keys are scaled
  Buffer<T> keys_t, lams_t;  // [H, blocks, d, kBlock]
  Buffer<T> d_keys;          // [H, rows, padded]
  Buffer<T> lse, along;      // [H, blocks kBlock]: log-sum-exp, 0 where a row sees nothing; lam . y
  // Of a strip. A row of scores is a column of the attention matrix.
  Buffer<T> queries, values;   // [G, kFew, padded]
  Buffer<T> d_query, d_value;  // [G, kFew, padded]
  Buffer<T> weights, slopes;   // [kFew, blocks kBlock]
  Buffer<T> few, few_slopes;   // [kFew]

  explicit FeedbackAdjointScratch(const Sizes<T>& z)
      : keys(z.heads * z.rows * z.padded), lams(z.heads * z.rows * z.padded),
        keys_t(z.heads * z.blocks * z.dim * kBlock), lams_t(z.heads * z.blocks * z.dim * kBlock),
        d_keys(z.heads * z.rows * z.padded), lse(z.heads * z.blocks * kBlock), along(z.heads * z.blocks * kBlock),
        queries(z.groups * kFew * z.padded), values(z.groups * kFew * z.padded), d_query(z.groups * kFew * z.padded),
        d_value(z.groups * kFew * z.padded), weights(kFew * z.blocks * kBlock), slopes(kFew * z.blocks * kBlock),
        few(kFew), few_slopes(kFew) {}
};

template <class T>
class FeedbackAdjoint : FeedbackSample<T, FeedbackAdjointArguments<T>> {
  using Base = FeedbackSample<T, FeedbackAdjointArguments<T>>;
  using Base::a, Base::b, Base::z, Base::bias_of, Base::keep_of;

 public:
  FeedbackAdjoint(const FeedbackAdjointArguments<T>& a, const Sizes<T>& z, int64_t b) : Base{a, z, b}, t(z) {
    for (int64_t h = 0; h < z.heads; ++h)
      for (int64_t i = 0; i < z.n; ++i) take_row(h, i);
  }

  // Begin with the `count` rows from s on: what later rows give their queries and values.
  void begin_strip(int64_t s, int64_t count) {
    for (int64_t g = 0; g < z.groups; ++g) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = this->at_groups(s + r) + g * z.dim;
        copy(of_strip(t.queries, g, r), a.query + at, z.dim);
        copy(of_strip(t.values, g, r), a.seen + at, z.dim);
        copy(of_strip(t.d_query, g, r), a.d_query + at, z.dim);
        copy(of_strip(t.d_value, g, r), a.d_seen + at, z.dim);
      }
      for (int64_t h = g * z.shared; s + count < z.n && h < (g + 1) * z.shared; ++h) gather(g, h, s, count);
    }
  }

  // What later rows of the strip give row i; its query's cotangent before norm and rotation goes to `made`, its value's
  // to `fed`, both [G d].
  void collect_row(int64_t s, int64_t count, int64_t i, T* made, T* fed) {
    for (int64_t g = 0; g < z.groups; ++g) {
      for (int64_t h = g * z.shared; i + 1 < s + count && h < (g + 1) * z.shared; ++h) gather_few(g, h, s, count, i);
      T *d_query = of_strip(t.d_query, g, i - s), *d_value = of_strip(t.d_value, g, i - s);
      before_map(g, i, d_query, of_strip(t.queries, g, i - s));
      copy(made + g * z.dim, d_query, z.dim);
      copy(fed + g * z.dim, d_value, z.dim);
    }
    copy(a.made + this->at_groups(i), made, z.groups * z.dim);
    copy(a.d_seen + this->at_groups(i), fed, z.groups * z.dim);
  }

  // The row's lam from what Omega_Q (null: queries read no outputs) and Psi_V make of these.
  void solve_row(int64_t i, const T* through_query, const T* through_value) {
    const int64_t size = z.heads * z.dim;
    T* lam = a.lam + this->at_heads(i);
    pull_read(i, through_value, lam);
    for (int64_t h = 0; h < z.heads; ++h)
      add(lam + h * z.dim, a.grad + b * a.grad_b + this->row_of(i) * a.grad_n + h * a.grad_h, T(1), z.dim);
    if (through_query != nullptr) add(lam, through_query, T(1), size);
    for (int64_t g = 0; g < z.groups; ++g) zero(a.d_own_value + own_value_at(g, i), z.dim);
    for (int64_t h = 0; h < z.heads; ++h) keep_row(h, i, lam + h * z.dim);
  }

  void give_keys() {
    for (int64_t h = 0; h < z.heads; ++h)
      for (int64_t i = 0; i < z.n; ++i) {
        T* out = a.d_key + this->at_score(h, i) * z.dim;
        for (int64_t k = 0; k < z.dim; ++k) out[k] = of_row(t.d_keys, h, i)[k] * T(a.scale);
      }
  }

 private:
  T* of_row(T* array, int64_t h, int64_t i) { return array + (h * z.rows + i) * z.padded; }
  T* of_strip(T* array, int64_t g, int64_t r) { return array + (g * kFew + r) * z.padded; }
  T* columns_of(T* array, int64_t h, int64_t i) {
    return array + (h * z.blocks + i / kBlock) * z.dim * kBlock + i % kBlock;
  }
  T* number_of(T* array, int64_t h, int64_t i) { return array + h * z.blocks * kBlock + i; }
  T* slope_of(int64_t h, int64_t i, int64_t j) { return a.slope + ((b * z.heads + h) * z.n + i) * z.n + j; }
  int64_t own_value_at(int64_t g, int64_t i) { return ((b * z.groups + g) * z.length + this->row_of(i)) * z.dim; }

  void take_row(int64_t h, int64_t i) {
    const T* key = this->key_row(h, i);
    T *row = of_row(t.keys, h, i), *column = columns_of(t.keys_t, h, i);
    for (int64_t k = 0; k < z.dim; ++k) column[k * kBlock] = row[k] = key[k] * T(a.scale);
    const T lse = a.lse[this->at_score(h, i)];
    *number_of(t.lse, h, i) = lse == -kInfinity<T> ? T(0) : lse;
  }

  void gather(int64_t g, int64_t h, int64_t s, int64_t count) {
    const int64_t from = s + kFew, width = z.blocks * kBlock;  // a strip that rows follow is whole
    T *queries = of_strip(t.queries, g, 0), *values = of_strip(t.values, g, 0);
    for (int64_t i = from; i < z.n; i = (i / kBlock + 1) * kBlock) {
      const int64_t columns = std::min(kBlock - i % kBlock, round_up<T>(z.n - i));
      multiply(Rows<T>{t.weights + i, width}, Left<T>{queries, z.padded}, Right<T>{columns_of(t.keys_t, h, i), kBlock},
               count, columns, z.dim);
      multiply(Rows<T>{t.slopes + i, width}, Left<T>{values, z.padded}, Right<T>{columns_of(t.lams_t, h, i), kBlock},
               count, columns, z.dim);
    }
    for (int64_t r = 0; r < count; ++r)
      linearize(h, s + r, from, z.n, t.weights + r * width + from, t.slopes + r * width + from);
    const int64_t rows = z.n - from;
    multiply<true>(Rows<T>{of_strip(t.d_query, g, 0), z.padded}, Left<T>{t.slopes + from, width},
                   Right<T>{of_row(t.keys, h, from), z.padded}, count, z.padded, rows);
    multiply<true>(Rows<T>{of_strip(t.d_value, g, 0), z.padded}, Left<T>{t.weights + from, width},
                   Right<T>{of_row(t.lams, h, from), z.padded}, count, z.padded, rows);
    multiply<true>(Rows<T>{of_row(t.d_keys, h, from), z.padded}, Left<T>{t.slopes + from, 1, width},
                   Right<T>{queries, z.padded}, rows, z.padded, count);
  }

  void gather_few(int64_t g, int64_t h, int64_t s, int64_t count, int64_t j) {
    const int64_t r = j - s;
    const T* query = of_strip(t.queries, g, r);
    T *weights = t.few, *slopes = t.few_slopes;
    few_scores(weights, query, columns_of(t.keys_t, h, s), z.dim);
    few_scores(slopes, of_strip(t.values, g, r), columns_of(t.lams_t, h, s), z.dim);
    linearize(h, j, s, s + count, weights, slopes);
    for (int64_t i = r + 1; i < count; ++i) {
      add(of_strip(t.d_query, g, r), of_row(t.keys, h, s + i), slopes[i], z.dim);
      add(of_strip(t.d_value, g, r), of_row(t.lams, h, s + i), weights[i], z.dim);
      add(of_row(t.d_keys, h, s + i), query, slopes[i], z.dim);
    }
  }

  // Turn scores of the rows from .. to on column j, and lam . u_j, into weights (times dropout factors) and cotangents of
  // scores. `from` starts a vector; entries up to j, and behind `to`, hold nothing of meaning.
  void linearize(int64_t h, int64_t j, int64_t from, int64_t to, T* weights, T* slopes) {
    const int64_t first = std::max(from, j + 1);
    for (int64_t i = first; a.bias != nullptr && i < to; ++i) weights[i - from] += bias_of(h, i, j);
    for (int64_t i = first; a.keep != nullptr && i < to; ++i) slopes[i - from] *= keep_of(h, i, j);
    for (int64_t i = from; i < to; i += kLanes<T>) {
      const Vector<T> p = exponential(load(weights + i - from) - load(number_of(t.lse, h, i)));
      store(weights + i - from, p);
      store(slopes + i - from, p * (load(slopes + i - from) - load(number_of(t.along, h, i))));
    }
    for (int64_t i = first; a.slope != nullptr && i < to; ++i) *slope_of(h, i, j) = slopes[i - from];
    for (int64_t i = first; a.keep != nullptr && i < to; ++i) weights[i - from] *= keep_of(h, i, j);
  }

  // The cotangent of what Omega_Q makes from that of a query, in place.
  void before_map(int64_t g, int64_t i, T* d_query, const T* query) {
    if (a.inverse != nullptr) {
      add(d_query, query, -dot(d_query, query, z.dim) / T(z.dim), z.dim);
      scale(d_query, a.inverse[(b * z.length + this->row_of(i)) * z.groups + g], z.dim);
    }
    if (a.cosine != nullptr) turn_back(d_query, a.cosine + this->turn_at(i), a.sine + this->turn_at(i), z.dim / 2);
  }

  // The cotangent of y from that of what Psi_V reads.
  void pull_read(int64_t i, const T* d_read, T* d_y) {
    const int64_t size = z.heads * z.dim;
    const T factor = this->read_factor(i), *y = a.y + this->at_heads(i);
    copy(d_y, d_read, size);
    if (!a.normed) return;
    add(d_y, y, -factor * factor * dot(d_read, y, size) / T(size), size);
    scale(d_y, factor, size);
  }

  void keep_row(int64_t h, int64_t i, const T* lam) {
    T *row = of_row(t.lams, h, i), *column = columns_of(t.lams_t, h, i);
    copy(row, lam, z.dim);
    for (int64_t k = 0; k < z.dim; ++k) column[k * kBlock] = lam[k];
    const T along = dot(lam, a.y + this->at_heads(i) + h * z.dim, z.dim);
    *number_of(t.along, h, i) = along;
    const int64_t g = h / z.shared;
    const T p = exponential_of(this->own_score(h, i) - *number_of(t.lse, h, i)), keep = keep_of(h, i, i);
    const T slope = p * (keep * dot(lam, this->value_row(g, i), z.dim) - along);
    a.own_slope[this->at_score(h, i)] = slope;
    if (a.slope != nullptr) *slope_of(h, i, i) = slope;
    add(a.d_own_value + own_value_at(g, i), lam, p * keep, z.dim);
  }

  FeedbackAdjointScratch<T> t;
};

template <class T>
void feedback_adjoint(const FeedbackAdjointArguments<T>& a) {
  const Sizes<T> z(a);
  const int64_t outputs = z.groups * z.dim, inputs = z.heads * z.dim, width = round_up<T>(inputs, kPanel<T>);
  Buffer<T> feedback(width * outputs), weight(a.weight == nullptr ? 0 : width * outputs);
  pack_inputs(a.feedback, outputs, inputs, static_cast<T*>(feedback));
  if (a.weight != nullptr) pack_inputs(a.weight, outputs, inputs, static_cast<T*>(weight));
  for_samples_together(z.batch, a.threads, [&](int64_t b, int64_t some) {
    std::vector<std::unique_ptr<FeedbackAdjoint<T>>> samples;
    for (int64_t m = 0; m < some; ++m) samples.push_back(std::make_unique<FeedbackAdjoint<T>>(a, z, b + m));
    Buffer<T> made(some * outputs), fed(some * outputs), by_query(some * width), by_value(some * width);
    auto pull = [&](T* out, T* from, T* packed) {
      multiply(Rows<T>{out, width}, Left<T>{from, outputs}, Right<T>{packed, kPanel<T>, outputs * kPanel<T>}, some,
               width, outputs);
    };
    for (int64_t s = (z.n - 1) / kFew * kFew; s >= 0; s -= kFew) {
      const int64_t count = std::min(kFew, z.n - s);
      for (auto& sample : samples) sample->begin_strip(s, count);
      for (int64_t i = s + count - 1; i >= s; --i) {
        for (int64_t m = 0; m < some; ++m)
          samples[m]->collect_row(s, count, i, made + m * outputs, fed + m * outputs);
        pull(by_value, fed, feedback);
        if (a.weight != nullptr) pull(by_query, made, weight);
        for (int64_t m = 0; m < some; ++m)
          samples[m]->solve_row(i, a.weight == nullptr ? nullptr : by_query + m * width, by_value + m * width);
      }
    }
    for (auto& sample : samples) sample->give_keys();
  });
}

}  // namespace implicit_attention::CAPABILITY
