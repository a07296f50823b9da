// What the forward pass of one sample works on.
#pragma once

#include "arguments.h"
#include "row_solver.h"
#include "scratch.h"

namespace implicit_attention::CAPABILITY {

constexpr int64_t kStrip = 16;  // rows whose scores on all columns before them are held at once

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
  Buffer<T> whole;    // [R, hvec]: log-sum-exp of all that they see
  Buffer<T> errors;   // [R]: residuals
  Buffer<T> sizes;    // [R]: the largest entries of their outputs
  Buffer<int64_t> sweeps;  // [R]
  // Of one row. "Others" are all columns but its own.
  Buffer<T> pairs;    // [R, hvec]: scores on the rows before it
  Buffer<T> share;    // [hvec]: of others' weight, what falls on those before the R rows
  Buffer<T> mix;      // [R, hvec]: and on the rows before it, times dropout factors
  Buffer<T> peak, total;  // [hvec]: others' exponentials are measured from `peak`; their sum
  Buffer<T> others_lse;   // [hvec]
  Buffer<T> others;   // [H, padded]: attention to others
  Buffer<T> change;   // [H, padded]: the own value minus that
  Buffer<T> reach;    // [hvec]: its largest entry
  T most = 0;         // a bound on the entries of its output
  Buffer<T> key;      // [H, padded], with the rotation undone
  Buffer<T> own;      // [G, 1 + H, padded]: a query is the first of these plus p_h times the others
  Buffer<T> squares, scores_at, offset;  // [hvec]: own weights are sigmoid(score + offset)
  Buffer<T> p, next, third;              // [hvec]: own weights, after one more sweep, and after the third from y = v
  Buffer<T> nexts, changes;              // [hvec]: `next` of the sweep before, and how far it was from its `p`
  Buffer<double> root;  // [H]
  RowSolver solver;

  ForwardScratch(const Sizes<T>& z, bool normed)
      : values(z.groups * z.rows * z.padded), columns(z.groups * z.blocks * z.dim * kBlock),
        keys(z.heads * (kBlock + R) * z.padded), before(z.heads * (kBlock + R) * z.padded), lse((kBlock + R) * z.hvec),
        scores(z.groups * kStrip * z.blocks * kBlock), attended(z.groups * kStrip * z.padded),
        made(z.groups * 2 * R * z.heads * z.padded), fixed(z.groups * R * z.padded), queries(z.groups * R * z.padded),
        norms(z.groups * R), outputs(z.heads * R * z.padded), whole(R * z.hvec), errors(R), sizes(R), sweeps(R),
        pairs(R * z.hvec), share(z.hvec), mix(R * z.hvec), peak(z.hvec), total(z.hvec), others_lse(z.hvec),
        others(z.heads * z.padded), change(z.heads * z.padded), reach(z.hvec), key(z.heads * z.padded),
        own(z.groups * (z.heads + 1) * z.padded), squares(z.hvec), scores_at(z.hvec), offset(z.hvec),
        p(z.hvec), next(z.hvec), third(z.hvec), nexts(z.hvec), changes(z.hvec), root(z.heads),
        solver(z.heads, normed ? z.groups : 0) {}
};

}  // namespace implicit_attention::CAPABILITY
