// Sweeps over the weights of R rows, the heads side by side, and what ends them.
#pragma once

#include "forward.h"

namespace implicit_attention::CAPABILITY {

// One row's weights on the rows up to itself, in all heads, and a bound on how far they move its output: weights sum to 1,
// so outputs move by at most |delta share| max|before| + sum_j |delta weight_j| max|value_j|.
template <class T>
void ForwardSample<T>::weigh(int64_t s, int64_t i, Iterate<T>& at, Iterate<T>& next) {
  typedef Vector<T> V;
  const V none{};
  for (int64_t h = 0; h < z.hvec; h += kLanes<T>) {
    auto of = [&](const T* array, int64_t j) { return load(array + (i * R + j) * z.hvec + h); };
    const int64_t row = i * z.hvec + h;
    const V old = load(&lse_of(h, s + i)), start = load(t.start + row);
    V peak = old > start ? old : start;
    for (int64_t j = 0; j <= i; ++j) {
      const V score = of(t.pairs, j);
      peak = score > peak ? score : peak;
    }
    peak = peak == -kInfinity<T> ? none : peak;

    V p[R], rest = exponential(old - peak), total = rest;
    const V before = rest, first = exponential(start - peak);
    for (int64_t j = 0; j <= i; ++j) {
      p[j] = exponential(of(t.pairs, j) - peak);
      rest = total;
      total = total + p[j];
    }
    const V inverse = total == 0 ? none : 1 / total;
    const V change = modulus(first / (rest + first) - p[i] * inverse);
    store(t.changes + row, of(t.pairs, i) == -kInfinity<T> ? none : change);
    store(t.peak + row, peak);
    store(t.total + row, total);
    store(t.rest + row, rest);

    const V share = before * inverse;
    V bound = modulus(share - load(at.shares + row)) * load(t.reach + row);
    store(next.shares + row, share);
    for (int64_t j = 0; j < R; ++j) {
      const V weight = j <= i ? p[j] * inverse : none;
      bound += modulus(weight - of(at.weights, j)) * of(t.reaches, j);
      store(next.weights + (i * R + j) * z.hvec + h, weight);
    }
    store(t.bounds + row, bound);
  }
  pack(i, next);
}

// The weights as the left factor of a product.
template <class T>
void ForwardSample<T>::pack(int64_t i, Iterate<T>& next) {
  for (int64_t h = 0; h < z.heads; ++h) {
    next.share[i * z.heads + h] = next.shares[i * z.hvec + h];
    for (int64_t j = 0; j < R; ++j)
      next.mix[(i * R + j) * z.heads + h] = next.weights[(i * R + j) * z.hvec + h] * t.factors[(i * R + j) * z.hvec + h];
  }
}

// Outputs at an iterate, and how far the map moves them; NaN has been noticed before, in bounds.
template <class T>
void ForwardSample<T>::compare(int64_t h, int64_t s, int64_t m, Iterate<T>& at, Iterate<T>& next) {
  typedef Vector<T> V;
  for (int64_t i = 0; i < m; ++i) {
    const T share = at.share[i * z.heads + h], further = next.share[i * z.heads + h] - share;
    T p[R], change[R];
    for (int64_t j = 0; j < R; ++j) {
      p[j] = at.mix[(i * R + j) * z.heads + h];
      change[j] = next.mix[(i * R + j) * z.heads + h] - p[j];
    }
    const T *before = before_row(h, s + i), *value = value_rows(h / z.shared, s);
    V far{}, size{};
    for (int64_t k = 0; k < z.padded; k += kLanes<T>) {
      V y = share * load(before + k), moved = further * load(before + k);
      for (int64_t j = 0; j < R; ++j) {
        const V v = load(value + j * z.padded + k);
        y += p[j] * v;
        moved += change[j] * v;
      }
      store(t.outputs + (h * R + i) * z.padded + k, y);
      far = larger(modulus(moved), far);
      size = larger(modulus(y + moved), size);
    }
    t.errors[i * z.heads + h] = largest_lane<T>(far);
    t.sizes[i * z.heads + h] = largest_lane<T>(size);
  }
}

// Whether all rows are within tolerance, by errors and sizes of their heads; `lost` where one is not finite.
template <class T>
Verdict ForwardSample<T>::within(const T* errors, const T* sizes, int64_t stride, int64_t m) {
  Verdict verdict = Verdict::settled;
  for (int64_t i = 0; i < m; ++i) {
    T error = 0, size = 0;
    for (int64_t h = 0; h < z.heads; ++h) {
      const T one = errors[i * stride + h];
      if (!(one < kInfinity<T>)) return Verdict::lost;
      error = std::max(error, one);
      size = std::max(size, sizes[i * stride + h]);
    }
    if (!(error <= T(a.atol) + T(a.rtol) * size)) verdict = Verdict::open;
  }
  return verdict;
}

// The largest entry of an array [R, hvec] in the rows at work.
template <class T>
T ForwardSample<T>::largest_of(const T* array, int64_t m) {
  T worst = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t h = 0; h < z.heads; ++h) worst = std::max(worst, array[i * z.hvec + h]);
  return worst;
}

// Whether sweeps contract too slowly, or so that kPatience more of them will not do.
template <class T>
bool ForwardSample<T>::settles_slowly(T worst, T pace, int64_t m) {
  const T allowed = T(a.atol) + T(a.rtol) * largest_of(t.reach, m);
  return pace > T(a.slow) || worst * std::pow(pace, T(kPatience)) > allowed;
}

// Hand over the iterate at which the map was evaluated, its queries and log-sum-exp.
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
      const T total = t.total[i * z.hvec + h];
      lse = total == 0 ? -kInfinity<T> : t.peak[i * z.hvec + h] + std::log(total);
    });
  }
}

template <class T>
void ForwardSample<T>::report(int64_t s, int64_t m, int sweeps) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = b * z.length + row_of(s + i);
    const T *errors = t.errors + i * z.heads, *sizes = t.sizes + i * z.heads;
    a.residual[at] = *std::max_element(errors, errors + z.heads);
    a.size[at] = *std::max_element(sizes, sizes + z.heads);
    a.sweeps[at] = sweeps;
  }
}

}  // namespace implicit_attention::CAPABILITY
