// Rows' own columns, solved for exactly within a sweep of the adjoint.
//
// The own column of a row is of rank one per head: with u_h = p_h (v_h - y_h) and w_g the gradient of the own score of head
// g by the row's output, J_own^T lam = sum_h (u_h . lam_h) w_h. A residual r is therefore corrected by
//
//     delta = (I - J_own^T)^-1 r = r + sum_h z_h w_h,    (I - M^T) z = (u_h . r_h),    M_gh = w_g,h . u_h
//
// What is left couples each row to later ones alone: of R rows, after R corrections nothing is but rounding.
#pragma once

#include "adjoint.h"

namespace implicit_attention::CAPABILITY {

template <class T>
void AdjointSample<T>::prepare_own(int64_t s, int64_t m) {
  team.each(z.groups, [&](int64_t g) { ascend(g, s, m); });
  for (int64_t h = 0; h < z.heads; ++h) couple(h, m);
  for (int64_t i = 0; i < m; ++i) invert(i, block + s + i);
}

// The gradients of the own scores of a group's heads; how those heads' outputs move with the own weights.
template <class T>
void AdjointSample<T>::ascend(int64_t g, int64_t s, int64_t m) {
  heads_of(g, [&](int64_t h) {
    T* through = of_four(t.through, h, 0);
    for (int64_t j = 0; j < m; ++j) {
      copy(through + j * z.padded, of_block(t.keys, h, s + j), z.dim);
      before_map(g, s + j, through + j * z.padded);
      const T *y = y_row(h, s + j), *v = value_row(g, s + j);
      const T p = t.pairs[(h * R + j) * R + j], keep = keep_of(h, s + j, block + s + j);
      T* u = of_four(t.u, h, j);
      for (int64_t k = 0; k < z.dim; ++k) u[k] = p * (keep * v[k] - y[k]);
    }
    zero(through + m * z.padded, (R - m) * z.padded);
    for (int64_t into = 0; into < z.heads; ++into) {
      T* w = of_four(t.ascent, h * z.heads + into, 0);
      if (weight == nullptr) {
        copy(w, through, R * z.padded);
      } else {
        multiply(Rows<T>{w, z.padded}, Left<T>{through, z.padded},
                 Right<T>{weight + into * size * z.padded + g * z.dim * kPanel<T>, kPanel<T>, size * kPanel<T>}, R, z.padded, z.dim);
      }
    }
  });
}

// A head's column of M, for each row.
template <class T>
void AdjointSample<T>::couple(int64_t h, int64_t m) {
  for (int64_t j = 0; j < m; ++j)
    for (int64_t g = 0; g < z.heads; ++g)
      t.inverses[(j * z.heads + g) * z.heads + h] =
          dot(of_four(t.ascent, g * z.heads + h, j), of_four(t.u, h, j), z.dim);
}

// Replace a row's M by the inverse of I - M^T, in float64; hand M over if one of its eigenvalues may be close to 1.
template <class T>
void AdjointSample<T>::invert(int64_t i, int64_t row) {
  const int64_t n = z.heads;
  T* matrix = t.inverses + i * n * n;
  for (int64_t g = 0; g < n; ++g) {
    for (int64_t h = 0; h < n; ++h) {
      const double one = g == h;
      t.elimination[h * 2 * n + g] = one - double(matrix[g * n + h]);
      t.elimination[g * 2 * n + n + h] = one;
    }
  }
  // An eigenvalue at a distance e from 1 makes the norm of the inverse 1 / e or more.
  if (!(eliminate() * a.near_singular * a.near_singular < 1.0)) {
    a.suspect[b * z.n + row] = 1;
    copy(a.gain + (b * z.n + row) * n * n, matrix, n * n);
  }
  for (int64_t g = 0; g < n; ++g)
    for (int64_t h = 0; h < n; ++h) matrix[g * n + h] = T(t.elimination[g * 2 * n + n + h]);
}

// Turn (A, I) into (I, A^-1), by Gauss and Jordan with pivots; returns the squared norm of the inverse.
template <class T>
double AdjointSample<T>::eliminate() {
  const int64_t n = z.heads, width = 2 * n;
  double* rows = t.elimination;
  for (int64_t k = 0; k < n; ++k) {
    int64_t best = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::abs(rows[i * width + k]) > std::abs(rows[best * width + k])) best = i;
    for (int64_t j = 0; best != k && j < width; ++j) std::swap(rows[k * width + j], rows[best * width + j]);
    const double inverse = 1.0 / rows[k * width + k];
    for (int64_t j = 0; j < width; ++j) rows[k * width + j] *= inverse;
    for (int64_t i = 0; i < n; ++i) {
      const double factor = rows[i * width + k];
      for (int64_t j = k; i != k && j < width; ++j) rows[i * width + j] -= factor * rows[k * width + j];
    }
  }
  double total = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = n; j < width; ++j) total += rows[i * width + j] * rows[i * width + j];
  return total;
}

template <class T>
void AdjointSample<T>::correct(int64_t m) {
  for (int64_t h = 0; h < z.heads; ++h) {
    for (int64_t j = 0; j < m; ++j) {
      const T *out = of_four(t.out, h, j), *now = of_four(t.now, h, j), *u = of_four(t.u, h, j);
      T total = 0;
      for (int64_t k = 0; k < z.dim; ++k) total += (out[k] - now[k]) * u[k];
      t.right[j * z.heads + h] = total;
    }
  }
  for (int64_t g = 0; g < z.groups; ++g)
    for (int64_t j = 0; j < m; ++j) correct(g, j);
}

// Correct a row's lam in a group, and the cotangent that lam was made from, as if it had been made from that alone.
template <class T>
void AdjointSample<T>::correct(int64_t g, int64_t i) {
  T* made = t.made + i * size + g * z.dim;
  heads_of(g, [&](int64_t h) { copy(of_four(t.now, h, i), of_four(t.out, h, i), z.dim); });
  for (int64_t of = 0; of < z.heads; ++of) {
    const T share = dot<T>(t.inverses + (i * z.heads + of) * z.heads, t.right + i * z.heads, z.heads);
    heads_of(g, [&](int64_t h) { add(of_four(t.now, h, i), of_four(t.ascent, of * z.heads + h, i), share, z.dim); });
    if (of / z.shared == g) add(made, of_four(t.through, of, i), share, z.dim);
  }
}

}  // namespace implicit_attention::CAPABILITY
