// Maps whose values read outputs: what both directions share; README.md derives it.
//
// A row follows from the rows before it, so nothing is iterated: rows are solved one after the other, for a few samples at
// once, which share every reading of the two matrices.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "feedback_arguments.h"
#include "scratch.h"
#include "threads.h"

namespace implicit_attention::CAPABILITY {

constexpr int64_t kFew = 16;      // rows whose attention to earlier rows of the call is one product of matrices
constexpr int64_t kTogether = 4;  // samples that share a reading of the matrices

// One row of scores on the columns of its own strip: C[kFew] = a . B[d, kFew], the rows of B kBlock apart.
template <class T>
inline void few_scores(T* out, const T* a, const T* columns, int64_t dim) {
  tile<1, kFew / kLanes<T>, false>(Rows<T>{out, kFew}, Left<T>{a, dim}, Right<T>{columns, kBlock}, dim);
}

// A matrix [out, in] packed for products `x W^T`: panels of outputs, each [in, kPanel].
template <class T>
void pack_outputs(const T* weight, int64_t outputs, int64_t inputs, T* packed) {
  for (int64_t o = 0; o < outputs; ++o) {
    T* panel = packed + o / kPanel<T> * inputs * kPanel<T> + o % kPanel<T>;
    for (int64_t i = 0; i < inputs; ++i) panel[i * kPanel<T>] = weight[o * inputs + i];
  }
}

// The same for products `x W`: panels of inputs, each [out, kPanel].
template <class T>
void pack_inputs(const T* weight, int64_t outputs, int64_t inputs, T* packed) {
  for (int64_t i = 0; i < inputs; i += kPanel<T>)
    for (int64_t o = 0; o < outputs; ++o)
      copy(packed + i * outputs + o * kPanel<T>, weight + o * inputs + i, std::min(kPanel<T>, inputs - i));
}

// Deal samples to threads, a few at a time.
template <class Task>
void for_samples_together(int64_t batch, int64_t threads, Task task) {
  const int64_t each = (batch + std::max<int64_t>(threads, 1) - 1) / std::max<int64_t>(threads, 1);
  const int64_t together = std::max<int64_t>(std::min(kTogether, each), 1);
  auto some = [&](int64_t i) { task(i * together, std::min(together, batch - i * together)); };
  parallel_for((batch + together - 1) / together, some);
}

// Where the rows of a sample are in the tensors of a call, and what masks say of them. Rows and columns are counted from
// `first`.
template <class T, class Arguments>
struct FeedbackSample {
  const Arguments& a;
  const Sizes<T>& z;
  const int64_t b;

  int64_t row_of(int64_t i) const { return z.first + i; }
  int64_t at_heads(int64_t i) const { return (b * z.length + row_of(i)) * z.heads * z.dim; }
  int64_t at_groups(int64_t i) const { return (b * z.length + row_of(i)) * z.groups * z.dim; }
  int64_t at_score(int64_t h, int64_t i) const { return (b * z.heads + h) * z.length + row_of(i); }
  const T* key_row(int64_t h, int64_t i) const { return a.key + b * a.key_b + h * a.key_h + row_of(i) * a.key_n; }
  const T* value_row(int64_t g, int64_t i) const {
    return a.value + b * a.value_b + g * a.value_g + row_of(i) * a.value_n;
  }
  T bias_of(int64_t h, int64_t i, int64_t j) const {
    return a.bias == nullptr ? T(0) : a.bias[b * a.bias_b + h * a.bias_h + i * z.n + j];
  }
  T keep_of(int64_t h, int64_t i, int64_t j) const {
    return a.keep == nullptr ? T(1) : a.keep[((b * z.heads + h) * z.n + i) * z.n + j];
  }
  T own_score(int64_t h, int64_t i) const { return a.own_score[at_score(h, i)] + bias_of(h, i, i); }
  // What Psi_V reads is y times this.
  T read_factor(int64_t i) const {
    if (!a.normed) return T(1);
    const T* y = a.y + at_heads(i);
    const int64_t size = z.heads * z.dim;
    return 1 / std::sqrt(dot(y, y, size) / T(size) + T(a.eps));
  }
  int64_t turn_at(int64_t i) const { return b * a.turn_b + row_of(i) * (z.dim / 2); }
};

}  // namespace implicit_attention::CAPABILITY
