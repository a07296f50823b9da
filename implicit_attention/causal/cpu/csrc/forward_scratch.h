// What the forward pass of one sample works on.
#pragma once

#include "arguments.h"
#include "row_solver.h"
#include "scratch.h"

namespace implicit_attention::CAPABILITY {

constexpr int64_t kStrip = 16;  // rows whose scores on all columns before them are held at once

// An iterate of R rows, given by weights: y_ih = share_ih before_ih + sum_{j <= i} mix_ijh value_jh.
template <class T>
struct Iterate {
  Buffer<T> weights;  // [R, R, hvec]: softmax weights of the rows on each other
  Buffer<T> shares;   // [R, hvec]: on what came before them
  Buffer<T> mix;      // [R, R H]: weights times dropout factors
  Buffer<T> share;    // [R, H]: shares, without the padding

  Iterate(int64_t heads, int64_t hvec) : weights(R * R * hvec), shares(R * hvec), mix(R * R * heads), share(R * heads) {}
};

template <class T>
struct ForwardScratch {
  // Of all rows of the call. Queries are stored as columns, kBlock beside each other, so that a row of scores is a row of
  // vectors.
  Buffer<T> values;   // [G, rows, padded]
  Buffer<T> columns;  // [G, blocks, d, kBlock]
  // Of a block
  Buffer<T> keys;     // [H, kBlock + R, padded], scaled
  Buffer<T> before;   // [H, kBlock + R, padded]: attention to what comes before
  Buffer<T> lse;      // [kBlock + R, hvec]: its log-sum-exp
  Buffer<T> scores;   // [G, kStrip, blocks kBlock]
  Buffer<T> attended; // [G, kStrip, padded]
  // Of R rows
  Buffer<T> made;     // [G, 2 R, H, padded]: Omega_Q by head, of attention before the rows and of their values
  Buffer<T> fixed;    // [G, R, padded]: the part of their queries that does not depend on y
  Buffer<T> queries;  // [G, R, padded]
  Buffer<T> norms;    // [G, R]
  Buffer<T> outputs;  // [H, R, padded]
  Iterate<T> even, odd;
  Buffer<T> factors;  // [R, R, hvec]: dropout factors of the rows' weights on each other
  Buffer<T> pairs;    // [R, R, hvec]: scores of the rows on each other
  Buffer<T> start;    // [R, hvec]: scores on the own column at y = v
  Buffer<T> reach;    // [R, hvec]: the largest entries of attention before the rows
  Buffer<T> reaches;  // [R, R, hvec]: and of the values that they weigh
  Buffer<T> peak;     // [R, hvec]: what exponentials are measured from
  Buffer<T> total;    // [R, hvec]: their sum
  Buffer<T> rest;     // [R, hvec]: without the own column
  Buffer<T> changes;  // [R, hvec]: of the own weight since y = v
  Buffer<T> bounds;   // [R, hvec]: on how far a sweep moves outputs
  Buffer<T> errors;   // [R, H]: how far it moves them
  Buffer<T> sizes;    // [R, H]: the largest entries of F(y)
  // Of a row whose own equation is solved
  Buffer<T> own;      // [H + 2, padded]
  Buffer<double> root;  // [H]
  RowSolver solver;

  ForwardScratch(const Sizes<T>& z, bool normed)
      : values(z.groups * z.rows * z.padded), columns(z.groups * z.blocks * z.dim * kBlock),
        keys(z.heads * (kBlock + R) * z.padded), before(z.heads * (kBlock + R) * z.padded), lse((kBlock + R) * z.hvec),
        scores(z.groups * kStrip * z.blocks * kBlock), attended(z.groups * kStrip * z.padded),
        made(z.groups * 2 * R * z.heads * z.padded), fixed(z.groups * R * z.padded), queries(z.groups * R * z.padded),
        norms(z.groups * R), outputs(z.heads * R * z.padded), even(z.heads, z.hvec), odd(z.heads, z.hvec),
        factors(R * R * z.hvec), pairs(R * R * z.hvec), start(R * z.hvec), reach(R * z.hvec), reaches(R * R * z.hvec),
        peak(R * z.hvec), total(R * z.hvec), rest(R * z.hvec), changes(R * z.hvec), bounds(R * z.hvec),
        errors(R * z.heads), sizes(R * z.heads), own((z.heads + 2) * z.padded), root(z.heads),
        solver(z.heads, normed ? z.groups : 0) {}
};

}  // namespace implicit_attention::CAPABILITY
