// What the adjoint of one sample works on.
#pragma once

#include "arguments.h"
#include "scratch.h"

namespace implicit_attention::CAPABILITY {

// Pairs of R rows: each with itself, then with the later ones of each, (i, j) for i > j.
constexpr int64_t kPairs = R * (R + 1) / 2;
inline int64_t pair_of(int64_t i, int64_t j) {
  const int64_t later = R - 1 - j;
  return i == j ? i : R + later * (later - 1) / 2 + i - j - 1;
}

template <class T>
struct AdjointScratch {
  // Of all rows of the call
  Buffer<T> queries;  // [G, rows, padded]
  Buffer<T> d_query;  // [G, rows, padded]: what solved rows give the queries
  Buffer<T> d_value;  // [G, rows, padded]
  // Of a block. Tiles of scores are transposed: a row of them is a column of the attention matrix.
  Buffer<T> keys;     // [H, kBlock + R, padded], scaled
  Buffer<T> keys_t;   // [H, d, kBlock]
  Buffer<T> lams;     // [H, kBlock + R, padded]
  Buffer<T> lams_t;   // [H, d, kBlock]
  Buffer<T> d_key;    // [H, kBlock, padded]
  Buffer<T> seen;     // [H, kBlock]: log-sum-exp, 0 where a row sees nothing
  Buffer<T> along;    // [H, kBlock]: lam . y
  Buffer<T> slopes;   // [H, kBlock + R, kBlock]: cotangent of the scores within the block
  Buffer<T> weights;  // [H, R, kBlock]: softmax weights, times dropout factors, on R columns
  Buffer<T> far_weights, far_slopes;  // [G, kBlock, kBlock]: on the columns of an earlier block
  // Of R rows
  Buffer<T> pairs;    // [H, R, R]: their weights on each other
  Buffer<T> now;      // [H, R, padded]: lam
  Buffer<T> out;      // [H, R, padded]: g + J^T lam - lam; then what lam gets
  Buffer<T> made;     // [R, G d]: the cotangent of what Omega_Q makes
  Buffer<T> errors;   // [H]
  Buffer<T> u;        // [H, R, padded]: how the outputs move with the logarithms of the own weights
  Buffer<T> through;  // [H, pairs, padded]: the gradients of the scores on each other, by the linear map's output
  Buffer<T> ascent;   // [H (of y), pairs, H, padded]: by the outputs
  Buffer<T> turns;    // [pairs, H]: how the scores move
  Buffer<T> off;      // [d]
  Buffer<double> factors;  // [R, H, H]: of I - M^T
  Buffer<double> right;    // [H]
  Buffer<int64_t> pivots;  // [R, H]

  explicit AdjointScratch(const Sizes<T>& z)
      : queries(z.groups * z.rows * z.padded), d_query(z.groups * z.rows * z.padded),
        d_value(z.groups * z.rows * z.padded), keys(z.heads * (kBlock + R) * z.padded), keys_t(z.heads * z.dim * kBlock),
        lams(z.heads * (kBlock + R) * z.padded), lams_t(z.heads * z.dim * kBlock), d_key(z.heads * kBlock * z.padded),
        seen(z.heads * kBlock), along(z.heads * kBlock), slopes(z.heads * (kBlock + R) * kBlock),
        weights(z.heads * R * kBlock), far_weights(z.groups * kBlock * kBlock), far_slopes(z.groups * kBlock * kBlock),
        pairs(z.heads * R * R), now(z.heads * R * z.padded), out(z.heads * R * z.padded), made(R * z.groups * z.dim),
        errors(z.heads), u(z.heads * R * z.padded), through(z.heads * kPairs * z.padded),
        ascent(z.heads * kPairs * z.heads * z.padded), turns(kPairs * z.heads), off(z.dim),
        factors(R * z.heads * z.heads), right(z.heads), pivots(R * z.heads) {}
};

}  // namespace implicit_attention::CAPABILITY
