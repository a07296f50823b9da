// What R rows give each other in the adjoint, by substitution from the last of them to the first.
//
// The weight of row i on column j <= i is of rank one per head: with u_ijh = P_ijh (v_jh - y_ih) and w_ijh the gradient of
// the score of row i on column j in head h by y_j,
//
//     lam_j = r_j + sum_{i > j, h} z_ijh w_ijh + sum_h z_jjh w_jjh,    z_ijh = u_ijh . lam_ih.
//
// Later rows are known, and the own column leaves H equations (Woodbury): (I - M^T) z = (u_jjh . rest_h), where
// M_gh = w_jjg . u_jjh.
#pragma once

#include "adjoint.h"
#include "elimination.h"

namespace implicit_attention::CAPABILITY {

template <class T>
void AdjointSample<T>::prepare(int64_t s, int64_t m) {
  team.each(z.groups, [&](int64_t g) { ascend(g, s, m); });
  for (int64_t i = 0; a.own_score == nullptr && i < m; ++i) factor_own(i, block + s + i);
}

// The gradients of a group's scores: by the linear map's output, then by the outputs. How outputs move with own weights.
template <class T>
void AdjointSample<T>::ascend(int64_t g, int64_t s, int64_t m) {
  heads_of(g, [&](int64_t h) {
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        T* through = through_row(h, pair_of(i, j));
        if (i < m) {
          copy(through, of_block(t.keys, h, s + i), z.dim);
          before_map(g, s + j, through);
        } else {
          zero(through, z.padded);
        }
      }
      if (i >= m) continue;
      const T *y = y_row(h, s + i), *v = value_row(g, s + i);
      const T p = t.pairs[(h * R + i) * R + i], keep = keep_of(h, s + i, block + s + i);
      T* u = of_four(t.u, h, i);
      for (int64_t k = 0; k < z.dim; ++k) u[k] = p * (keep * v[k] - y[k]);
    }
    const int64_t first = a.own_score == nullptr ? 0 : R, row = z.heads * z.padded;
    for (int64_t into = 0; into < z.heads; ++into) {
      const Rows<T> w{ascent_rows(into, first) + h * z.padded, row};
      if (weight == nullptr) {
        for (int64_t pair = first; pair < kPairs; ++pair) copy(w.data + (pair - first) * row, through_row(h, pair), z.dim);
      } else {
        multiply(w, Left<T>{through_row(h, first), z.padded},
                 Right<T>{weight + into * size * z.padded + g * z.dim * kPanel<T>, kPanel<T>, size * kPanel<T>},
                 kPairs - first, z.padded, z.dim);
      }
    }
  });
}

// Factor a row's I - M^T, in float64; hand M over if one of its eigenvalues may be close to 1.
template <class T>
void AdjointSample<T>::factor_own(int64_t i, int64_t row) {
  const int64_t n = z.heads;
  T* gain = a.gain + (b * z.n + row) * n * n;
  double *factors = t.factors + i * n * n, total = 0;
  for (int64_t h = 0; h < n; ++h) {
    for (int64_t g = 0; g < n; ++g) {
      const T one = gain[g * n + h] = dot(ascent_rows(h, i) + g * z.padded, of_four(t.u, h, i), z.dim);
      factors[h * n + g] = double(g == h) - double(one);
      total += double(one) * double(one);
    }
  }
  factor(factors, n, t.pivots + i * n);
  // An eigenvalue close to 1 needs a norm of M that is about 1.
  const double least = 1 - a.near_singular;
  a.suspect[b * z.n + row] = !(total < least * least) && suspicious(factors, t.pivots + i * n);
}

// Whether the norm of the inverse leaves room for an eigenvalue close to 1: a distance e makes it 1 / e or more.
template <class T>
bool AdjointSample<T>::suspicious(const double* factors, const int64_t* pivots) {
  double total = 0;
  for (int64_t g = 0; g < z.heads; ++g) {
    for (int64_t h = 0; h < z.heads; ++h) t.right[h] = g == h;
    implicit_attention::substitute(factors, z.heads, pivots, t.right);
    for (int64_t h = 0; h < z.heads; ++h) total += t.right[h] * t.right[h];
  }
  return !(total * a.near_singular * a.near_singular < 1.0);
}

// Correct lam by what the residuals in `out` ask for. Returns a bound on the residual that is left, but for rounding: by
// Cauchy and Schwarz, |Omega_Q^T delta| <= |delta| max_j |Omega_Q e_j|.
template <class T>
T AdjointSample<T>::substitute(int64_t s, int64_t m) {
  T worst = 0;
  for (int64_t i = m - 1; i >= 0; --i) worst = larger(worst, substitute_row(s, i));
  return T(a.norm) * std::sqrt(worst);
}

// The same for one row; returns the square of the length of the error of what Omega_Q's output gets.
template <class T>
T AdjointSample<T>::substitute_row(int64_t s, int64_t i) {
  const int64_t n = z.heads, later = R - 1 - i, pair = later > 0 ? pair_of(i + 1, i) : R;
  for (int64_t h = 0; h < n; ++h)
    multiply<true>(Rows<T>{of_four(t.out, h, i), z.padded}, Left<T>{t.turns + pair * n, 0},
                   Right<T>{ascent_rows(h, pair), z.padded}, 1, z.padded, later * n);
  T* own = t.turns + i * n;
  if (a.own_score == nullptr) {
    for (int64_t h = 0; h < n; ++h) t.right[h] = dot(of_four(t.u, h, i), of_four(t.out, h, i), z.dim);
    implicit_attention::substitute(t.factors + i * n * n, n, t.pivots + i * n, t.right);
    for (int64_t h = 0; h < n; ++h) own[h] = T(t.right[h]);
    for (int64_t h = 0; h < n; ++h)
      multiply<true>(Rows<T>{of_four(t.out, h, i), z.padded}, Left<T>{own, 0}, Right<T>{ascent_rows(h, i), z.padded}, 1,
                     z.padded, n);
  }
  T off = 0;
  for (int64_t g = 0; g < z.groups; ++g) {
    T* made = made_row(g, i);
    zero<T>(t.off, z.dim);
    heads_of(g, [&](int64_t h) {
      const T* change = of_four(t.out, h, i);
      T slopes[R];
      t.along[h * kBlock + s + i] += pull(h, s, i, change, slopes);
      for (int64_t j = 0; j <= i; ++j) slopes_of(h, s + j)[s + i] += slopes[j];
      for (int64_t j = 0; j < i; ++j) t.turns[pair_of(i, j) * n + h] = slopes[j];
      for (int64_t k = 0; k < later; ++k)
        add(made, through_row(h, pair + k), t.turns[(pair + k) * n + h], z.dim);
      if (a.own_score == nullptr) {
        add(made, through_row(h, i), slopes[i], z.dim);
        add<T>(t.off, through_row(h, i), slopes[i] - own[h], z.dim);
      }
      add(of_four(t.now, h, i), change, T(1), z.dim);
    });
    off += dot<T>(t.off, t.off, z.dim);
  }
  return off;
}

}  // namespace implicit_attention::CAPABILITY
