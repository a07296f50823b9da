// What the adjoint of one sample works on.
#pragma once

#include "arguments.h"
#include "scratch.h"

namespace implicit_attention::CAPABILITY {

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
  Buffer<T> out;      // [H, R, padded]: g + J^T lam
  Buffer<T> made;     // [R, G d]: the cotangent of what Omega_Q makes
  Buffer<T> before;   // [R, G d]: that of the sweep before
  Buffer<T> errors;   // [H]
  Buffer<T> moves;    // [G, R]: how far `made` has moved, squared
  // Of rows whose own columns are solved for
  Buffer<T> u;        // [H, R, padded]: how the outputs move with the logarithms of the own weights
  Buffer<T> through;  // [H, R, padded]: the gradients of the own scores, by the linear map's output
  Buffer<T> ascent;   // [H, H, R, padded]: by the outputs
  Buffer<T> inverses; // [R, H, H]: of I - M^T
  Buffer<T> right;    // [R, H]
  Buffer<double> elimination;  // [H, 2 H]

  explicit AdjointScratch(const Sizes<T>& z)
      : queries(z.groups * z.rows * z.padded), d_query(z.groups * z.rows * z.padded),
        d_value(z.groups * z.rows * z.padded), keys(z.heads * (kBlock + R) * z.padded), keys_t(z.heads * z.dim * kBlock),
        lams(z.heads * (kBlock + R) * z.padded), lams_t(z.heads * z.dim * kBlock), d_key(z.heads * kBlock * z.padded),
        seen(z.heads * kBlock), along(z.heads * kBlock), slopes(z.heads * (kBlock + R) * kBlock),
        weights(z.heads * R * kBlock), far_weights(z.groups * kBlock * kBlock), far_slopes(z.groups * kBlock * kBlock),
        pairs(z.heads * R * R), now(z.heads * R * z.padded), out(z.heads * R * z.padded), made(R * z.groups * z.dim),
        before(R * z.groups * z.dim), errors(z.heads), moves(z.groups * R), u(z.heads * R * z.padded),
        through(z.heads * R * z.padded), ascent(z.heads * z.heads * R * z.padded), inverses(R * z.heads * z.heads),
        right(R * z.heads), elimination(2 * z.heads * z.heads) {}
};

}  // namespace implicit_attention::CAPABILITY
