// Vectors of the compiler, loops over them, and products of matrices whose result stays in registers.
//
// The kernels are compiled once per instruction set (see build.py), each time in a namespace of its own. So that the
// linker never takes one set's function for another's, nothing here is outside that namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#ifdef __FAST_MATH__
#error "fast-math gives wrong solutions: sums must keep their order, and NaN and Inf their meaning"
#endif

#ifndef CAPABILITY
#define CAPABILITY baseline
#endif

namespace implicit_attention::CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE, NEON
#endif

template <class T>
struct Simd {
  static constexpr int lanes = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int kLanes = Simd<T>::lanes;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
inline int64_t round_up(int64_t n, int64_t unit = kLanes<T>) {
  return (n + unit - 1) / unit * unit;
}

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// Combine the lanes of a vector of `N` into one, halves with each other: `combine` takes two vectors or two numbers.
template <int N, class T, class V, class Combine>
inline T fold(V v, Combine combine) {
  if constexpr (N == 1) {
    return v[0];
  } else if constexpr (N == 2) {
    return combine(v[0], v[1]);
  } else {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<N / 2, T>(combine(low, high), combine);
  }
}

template <class T>
inline T sum(Vector<T> v) {
  return fold<kLanes<T>, T>(v, [](auto a, auto b) { return a + b; });
}

// The larger of two numbers, or lanes of two vectors; NaN if one is. std::max would lose it.
template <class V>
inline V larger(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

template <class V>
inline V modulus(V a) {
  return a < 0 ? -a : a;
}

template <class T>
inline T largest_lane(Vector<T> v) {
  return fold<kLanes<T>, T>(v, [](auto a, auto b) { return larger(a, b); });
}

// exp(x) for x <= 0, to about one unit in the last place; 0 where it would be denormal, NaN for NaN.
inline Vector<float> exponential(Vector<float> x) {
  const Vector<float> low = splat(-87.0f), shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  const Vector<float> t = x < low ? low : x;
  const Vector<float> n = t * 1.4426950408889634f + shift, whole = n - shift;
  const Vector<float> r = (t - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
  Vector<float> s = splat(1.0f / 5040.0f);
  for (float c : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) s = s * r + c;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Vector<float> power = (Vector<float>)(((Bits)n + 127) << 23);
  return x < low ? Vector<float>{} : s * power;
}

inline Vector<double> exponential(Vector<double> x) {
  const Vector<double> low = splat(-708.0), shift = splat(6755399441055744.0);  // 1.5 * 2^52
  const Vector<double> t = x < low ? low : x;
  const Vector<double> n = t * 1.4426950408889634 + shift, whole = n - shift;
  const Vector<double> r = (t - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  Vector<double> s = splat(1.0 / 6227020800.0);
  for (double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                   1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    s = s * r + c;
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  const Vector<double> power = (Vector<double>)(((Bits)n + 1023) << 52);
  return x < low ? Vector<double>{} : s * power;
}

template <class T>
inline T exponential_of(T x) {
  return exponential(splat(x))[0];
}

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  Vector<T> total{}, other{};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
    total += load(a + i) * load(b + i);
    other += load(a + i + kLanes<T>) * load(b + i + kLanes<T>);
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) total += load(a + i) * load(b + i);
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum<T>(total + other) + rest;
}

// The products of `N` vectors with one: out[i] = a . b[i].
template <int N, class T>
inline void dots(const T* a, const T* const* b, int64_t n, T* out) {
  Vector<T> total[N] = {};
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) {
    const Vector<T> left = load(a + k);
    for (int i = 0; i < N; ++i) total[i] += left * load(b[i] + k);
  }
  for (int i = 0; i < N; ++i) {
    T rest = 0;
    for (int64_t j = k; j < n; ++j) rest += a[j] * b[i][j];
    out[i] = sum<T>(total[i]) + rest;
  }
}

// The largest entry, or `peak` if that is larger; NaN if there is one.
template <class T>
inline T largest_entry(const T* a, int64_t n, T peak) {
  Vector<T> best = splat(peak);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) best = larger(load(a + i), best);
  peak = largest_lane<T>(best);
  for (; i < n; ++i) peak = larger(a[i], peak);
  return peak;
}

// The largest modulus; NaN if there is one.
template <class T>
inline T largest_modulus(const T* a, int64_t n) {
  Vector<T> best{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) best = larger(modulus(load(a + i)), best);
  T worst = largest_lane<T>(best);
  for (; i < n; ++i) worst = larger(std::abs(a[i]), worst);
  return worst;
}

// The largest modulus of a - b; NaN if there is one.
template <class T>
inline T largest_difference(const T* a, const T* b, int64_t n) {
  Vector<T> best{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) best = larger(modulus(load(a + i) - load(b + i)), best);
  T worst = largest_lane<T>(best);
  for (; i < n; ++i) worst = larger(std::abs(a[i] - b[i]), worst);
  return worst;
}

// a = exp(a - peak) over n entries; returns their sum.
template <class T>
inline T exponentials(T* a, int64_t n, T peak) {
  Vector<T> total{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vector<T> e = exponential(load(a + i) - peak);
    store(a + i, e);
    total += e;
  }
  T rest = 0;
  for (; i < n; ++i) rest += a[i] = exponential_of(a[i] - peak);
  return sum<T>(total) + rest;
}

template <class T>
inline void copy(T* out, const T* from, int64_t n) {
  std::memcpy(out, from, n * sizeof(T));
}

template <class T>
inline void zero(T* out, int64_t n) {
  std::memset(out, 0, n * sizeof(T));
}

// out = share * other + out
template <class T>
inline void add(T* __restrict out, const T* __restrict other, T share, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += share * other[i];
}

template <class T>
inline void scale(T* out, T factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] *= factor;
}

// Rotate a query in place by rotary positions; `turn_back` undoes it.
template <class T>
inline void turn(T* __restrict q, const T* cosine, const T* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const T a = q[i], b = q[half + i];
    q[i] = a * cosine[i] - b * sine[i];
    q[half + i] = a * sine[i] + b * cosine[i];
  }
}

template <class T>
inline void turn_back(T* __restrict q, const T* cosine, const T* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const T a = q[i], b = q[half + i];
    q[i] = a * cosine[i] + b * sine[i];
    q[half + i] = b * cosine[i] - a * sine[i];
  }
}

// The left factor of a product: entry (m, k) is at `data[m * row + k * step]`.
template <class T>
struct Left {
  const T* data;
  int64_t row, step = 1;
};

// A matrix whose rows are contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t row;
};

// The right factor: rows of `kPanel` entries at a distance of `row`; the next columns follow after `panel`. So it is a matrix
// by rows, or one packed into panels that are read from front to back, as it suits the caches (`pack`).
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
template <class T>
struct Right {
  const T* data;
  int64_t row, panel = kPanel<T>;
};

// C = A B, or C += A B, for `R` rows and `V` vectors of columns. The sum runs in the order of k, so a row's result does
// not depend on the rows beside it.
template <int R, int V, bool kAccumulate, class T>
inline void tile(Rows<T> c, Left<T> a, Right<T> b, int64_t depth) {
  Vector<T> total[R][V];
  for (int m = 0; m < R; ++m)
    for (int v = 0; v < V; ++v) total[m][v] = kAccumulate ? load(c.data + m * c.row + v * kLanes<T>) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b.data + k * b.row + v * kLanes<T>);
    for (int m = 0; m < R; ++m) {
      const T factor = a.data[m * a.row + k * a.step];
      for (int v = 0; v < V; ++v) total[m][v] += factor * right[v];
    }
  }
  for (int m = 0; m < R; ++m)
    for (int v = 0; v < V; ++v) store(c.data + m * c.row + v * kLanes<T>, total[m][v]);
}

template <int V, bool kAccumulate, class T>
inline void columns(Rows<T> c, Left<T> a, Right<T> b, int64_t rows, int64_t depth) {
  int64_t i = 0;
  auto rows_from = [&](auto count) {  // as many rows as its type says
    tile<count(), V, kAccumulate>(Rows<T>{c.data + i * c.row, c.row}, Left<T>{a.data + i * a.row, a.row, a.step}, b, depth);
    i += count();
  };
  while (i + 6 <= rows) rows_from(std::integral_constant<int, 6>());
  while (i + 4 <= rows) rows_from(std::integral_constant<int, 4>());
  while (i < rows) rows_from(std::integral_constant<int, 1>());
}

// C = A B (or += A B) for C [rows, width], width a multiple of the vector, A [rows, depth], B [depth, width].
template <bool kAccumulate = false, class T>
__attribute__((noinline)) void multiply(Rows<T> c, Left<T> a, Right<T> b, int64_t rows, int64_t width, int64_t depth) {
  int64_t j = 0;
  for (; j + kPanel<T> <= width; j += kPanel<T>, b.data += b.panel)
    columns<2, kAccumulate>(Rows<T>{c.data + j, c.row}, a, b, rows, depth);
  if (j < width) columns<1, kAccumulate>(Rows<T>{c.data + j, c.row}, a, b, rows, depth);
}

}  // namespace implicit_attention::CAPABILITY
