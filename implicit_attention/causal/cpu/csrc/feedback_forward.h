// The forward pass of maps whose values read outputs: strips of kFew rows attend to what comes before them in the call by
// products of matrices, then its rows are solved one after the other.
#pragma once

#include "feedback.h"

namespace implicit_attention::CAPABILITY {

template <class T>
struct FeedbackForwardScratch {
  // Of all rows of the call
  Buffer<T> columns;   // [G, blocks, d, kBlock]: queries
  Buffer<T> values;    // [G, rows, padded]: what later rows see
  // Of a strip
  Buffer<T> keys;      // [H, kFew, padded], scaled
  Buffer<T> before;    // [H, kFew, padded]: attention to what comes before
  Buffer<T> lse;       // [H, kFew]
  Buffer<T> scores;    // [kFew, blocks kBlock]
  Buffer<T> attended;  // [kFew, padded]
  // Of a row
  Buffer<T> few;       // [kFew]
  Buffer<T> query;     // [padded]

  explicit FeedbackForwardScratch(const Sizes<T>& z)
      : columns(z.groups * z.blocks * z.dim * kBlock), values(z.groups * z.rows * z.padded),
        keys(z.heads * kFew * z.padded), before(z.heads * kFew * z.padded), lse(z.heads * kFew),
        scores(kFew * z.blocks * kBlock), attended(kFew * z.padded), few(kFew), query(z.padded) {}
};

template <class T>
class FeedbackForward : FeedbackSample<T, FeedbackForwardArguments<T>> {
  using Base = FeedbackSample<T, FeedbackForwardArguments<T>>;
  using Base::a, Base::b, Base::z, Base::bias_of, Base::keep_of;

 public:
  FeedbackForward(const FeedbackForwardArguments<T>& a, const Sizes<T>& z, int64_t b) : Base{a, z, b}, t(z) {}

  // Begin with the `count` rows from s on: what they attend to in earlier rows of the call.
  void begin_strip(int64_t s, int64_t count) {
    for (int64_t h = 0; h < z.heads; ++h) {
      for (int64_t r = 0; r < count; ++r) {
        const T* key = this->key_row(h, s + r);
        for (int64_t k = 0; k < z.dim; ++k) key_of(h, r)[k] = key[k] * T(a.scale);
        copy(before_of(h, r), a.y + this->at_heads(s + r) + h * z.dim, z.dim);
        t.lse[h * kFew + r] = a.lse[this->at_score(h, s + r)];
      }
      if (s > 0) attend(h, s, count);
    }
  }

  // The output of row i of the strip from s on; all rows before it are solved.
  void solve_row(int64_t s, int64_t i) {
    for (int64_t h = 0; h < z.heads; ++h) solve_head(h, s, i);
  }

  // From the products of the row's output with Psi_V and, where queries read outputs, Omega_Q, its column.
  void finish_row(int64_t i, const T* fed, const T* asked) {
    const T factor = this->read_factor(i);
    for (int64_t g = 0; g < z.groups; ++g) {
      T *query = a.query + this->at_groups(i) + g * z.dim, *seen = a.seen + this->at_groups(i) + g * z.dim;
      make_query(g, i, asked, query);
      T* column = t.columns + (g * z.blocks + i / kBlock) * z.dim * kBlock + i % kBlock;
      for (int64_t k = 0; k < z.dim; ++k) column[k * kBlock] = query[k];
      copy(seen, this->value_row(g, i), z.dim);
      add(seen, fed + g * z.dim, factor, z.dim);
      if (a.feedback_bias != nullptr) add(seen, a.feedback_bias + g * z.dim, T(1), z.dim);
      copy(value_of(g, i), seen, z.dim);
    }
  }

 private:
  T* key_of(int64_t h, int64_t r) { return t.keys + (h * kFew + r) * z.padded; }
  T* before_of(int64_t h, int64_t r) { return t.before + (h * kFew + r) * z.padded; }
  T* value_of(int64_t g, int64_t i) { return t.values + (g * z.rows + i) * z.padded; }

  void attend(int64_t h, int64_t s, int64_t count) {
    const int64_t g = h / z.shared, width = z.blocks * kBlock;
    for (int64_t j = 0; j < s; j += kBlock)
      multiply(Rows<T>{t.scores + j, width}, Left<T>{key_of(h, 0), z.padded},
               Right<T>{t.columns + (g * z.blocks + j / kBlock) * z.dim * kBlock, kBlock}, count,
               std::min(kBlock, s - j), z.dim);
    for (int64_t r = 0; r < count; ++r)
      scale(before_of(h, r), weigh(h, s, r, t.scores + r * width), z.dim);
    multiply(Rows<T>{t.attended, z.padded}, Left<T>{t.scores, width}, Right<T>{value_of(g, 0), z.padded}, count,
             z.padded, s);
    for (int64_t r = 0; r < count; ++r) add(before_of(h, r), t.attended + r * z.padded, T(1), z.dim);
  }

  // Turn a row's scores on the columns before its strip into weights; returns the weight of what it saw before those.
  T weigh(int64_t h, int64_t s, int64_t r, T* scores) {
    for (int64_t j = 0; a.bias != nullptr && j < s; ++j) scores[j] += bias_of(h, s + r, j);
    T& lse = t.lse[h * kFew + r];
    const T peak = largest_entry(scores, s, lse);
    if (peak == -kInfinity<T>) {
      zero(scores, s);
      return T(0);
    }
    const T old = exponential_of(lse - peak);
    const T total = exponentials(scores, s, peak) + old, inverse = 1 / total;
    scale(scores, inverse, s);
    for (int64_t j = 0; a.keep != nullptr && j < s; ++j) scores[j] *= keep_of(h, s + r, j);
    lse = peak + std::log(total);
    return old * inverse;
  }

  void solve_head(int64_t h, int64_t s, int64_t i) {
    const int64_t g = h / z.shared, r = i - s;
    T *out = a.y + this->at_heads(i) + h * z.dim, *few = t.few;
    if (r > 0)
      few_scores(few, key_of(h, r), t.columns + (g * z.blocks + s / kBlock) * z.dim * kBlock + s % kBlock, z.dim);
    for (int64_t j = 0; a.bias != nullptr && j < r; ++j) few[j] += bias_of(h, i, s + j);
    for (int64_t j = r; j < kFew; ++j) few[j] = -kInfinity<T>;
    const T old = t.lse[h * kFew + r], own = this->own_score(h, i);
    const T peak = largest_entry(few, r, larger(old, own));
    if (peak == -kInfinity<T>) {
      zero(out, z.dim);
      a.lse[this->at_score(h, i)] = peak;
      return;
    }
    const T rest = exponential_of(old - peak), self = exponential_of(own - peak);
    const T total = exponentials(few, kFew, peak) + rest + self, inverse = 1 / total;
    const T *before = before_of(h, r), *value = this->value_row(g, i);
    const T of_before = rest * inverse, of_self = self * inverse * keep_of(h, i, i);
    for (int64_t k = 0; k < z.dim; ++k) out[k] = of_before * before[k] + of_self * value[k];
    for (int64_t j = 0; j < r; ++j) add(out, value_of(g, s + j), few[j] * inverse * keep_of(h, i, s + j), z.dim);
    a.lse[this->at_score(h, i)] = peak + std::log(total);
  }

  void make_query(int64_t g, int64_t i, const T* asked, T* query) {
    zero(query, z.dim);
    if (asked != nullptr) copy(query, asked + g * z.dim, z.dim);
    if (a.constant != nullptr) add(query, a.constant + g * z.dim, T(1), z.dim);
    if (a.added != nullptr) add(query, a.added + this->at_groups(i) + g * z.dim, T(1), z.dim);
    if (a.inverse != nullptr) {
      const T inverse = 1 / std::sqrt(dot(query, query, z.dim) / T(z.dim) + T(a.eps));
      scale(query, inverse, z.dim);
      a.inverse[(b * z.length + this->row_of(i)) * z.groups + g] = inverse;
    }
    if (a.cosine != nullptr) turn(query, a.cosine + this->turn_at(i), a.sine + this->turn_at(i), z.dim / 2);
  }

  FeedbackForwardScratch<T> t;
};

template <class T>
void feedback_forward(const FeedbackForwardArguments<T>& a) {
  const Sizes<T> z(a);
  const int64_t outputs = z.groups * z.dim, inputs = z.heads * z.dim, half = round_up<T>(outputs, kPanel<T>);
  const int64_t width = a.weight == nullptr ? half : 2 * half;
  Buffer<T> packed(width * inputs);
  pack_outputs(a.feedback, outputs, inputs, static_cast<T*>(packed));
  if (a.weight != nullptr) pack_outputs(a.weight, outputs, inputs, packed + half * inputs);
  for_samples_together(z.batch, a.threads, [&](int64_t b, int64_t some) {
    std::vector<std::unique_ptr<FeedbackForward<T>>> samples;
    for (int64_t m = 0; m < some; ++m) samples.push_back(std::make_unique<FeedbackForward<T>>(a, z, b + m));
    Buffer<T> made(some * width);
    for (int64_t s = 0; s < z.n; s += kFew) {
      const int64_t count = std::min(kFew, z.n - s);
      for (auto& sample : samples) sample->begin_strip(s, count);
      for (int64_t i = s; i < s + count; ++i) {
        for (auto& sample : samples) sample->solve_row(s, i);
        const T* y = a.y + (b * z.length + z.first + i) * inputs;
        multiply(Rows<T>{made, width}, Left<T>{y, z.length * inputs}, Right<T>{packed, kPanel<T>, inputs * kPanel<T>},
                 some, width, inputs);
        for (int64_t m = 0; m < some; ++m) {
          const T* fed = made + m * width;
          samples[m]->finish_row(i, fed, a.weight == nullptr ? nullptr : fed + half);
        }
      }
    }
  });
}

}  // namespace implicit_attention::CAPABILITY
