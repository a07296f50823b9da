// What the caller hands over: one struct of named fields per call. `library.py` mirrors both, field by field.
//
// Every field has eight bytes, so that no compiler puts padding between them. Tensors are row-major; a pointer
// that may be null says so. Shapes: B samples, H heads, G groups of heads that share queries and values, N rows,
// d features of a head; n = stop - first rows are solved by this call.
#pragma once

#include <cstdint>

namespace implicit_attention {

template <class T>
struct ForwardArguments {
  int64_t bytes;                                           // sizeof(ForwardArguments), as a check
  int64_t threads;                                         // of torch
  int64_t batch, heads, groups, length, dim, first, stop;
  const T* key;                                            // [B, H, N, d]
  int64_t key_b, key_h, key_n;                             // strides
  const T* value;                                          // [B, G, N, d]
  int64_t value_b, value_g, value_n;
  const T* weight;                                         // [G d, H d] or null: one head, queries are outputs
  const T* constant;                                       // [G d] or null: added to every query
  const T* added;                                          // [B, N, G d] or null: added to the rows' queries
  const T* cosine;                                         // [1 or B, N, d / 2] or null: rotary positions
  const T* sine;
  int64_t turn_b;                                          // stride from sample to sample, 0 where they share it
  const T* own_score;                                      // [B, H, N] or null: self_query="input"
  const T* bias;                                           // [1 or B, 1 or H, n, n] or null: -inf hides
  int64_t bias_b, bias_h;
  const T* keep;                                           // [B, H, n, n] or null: dropout factors
  T* y;                                                    // [B, N, H, d]: in, attention to columns before `first`
  T* lse;                                                  // [B, H, N]: likewise; both out, of the equilibrium
  T* query;                                                // [B, N, G, d]
  T* inverse;                                              // [B, N, G], what the norm multiplied with; null: no norm
  const T* norm_weight;                                    // [d] or null: then multiplies normed queries
  T* residual;                                             // [B, N]: max |F(y) - y|
  T* size;                                                 // [B, N]: max |F(y)|
  int64_t* sweeps;                                         // [B, N]
  T* before_y;                                             // [B, n, H, d] or null: gets y as it came in
  T* before_lse;                                           // [B, H, n] or null
  int64_t* settled;                                        // [B]: rows that are solved, from `first` on
  double scale, eps, rtol, atol;
  double same_root, slow;                                  // as in diagonal.py
};

template <class T>
struct AdjointArguments {
  int64_t bytes;
  int64_t threads;
  int64_t batch, heads, groups, length, dim, first, stop;
  const T* key;
  int64_t key_b, key_h, key_n;
  const T* value;
  int64_t value_b, value_g, value_n;
  const T* weight;
  const T* cosine;
  const T* sine;
  int64_t turn_b;
  const T* own_score;
  const T* bias;
  int64_t bias_b, bias_h;
  const T* keep;
  const T* y;                                              // [B, N, H, d]: the equilibrium
  const T* lse;                                            // [B, H, N]
  const T* query;                                          // [B, N, G, d]
  const T* inverse;                                        // [B, N, G] or null
  const T* norm_weight;                                    // [d] or null
  const T* normed;                                         // [B, N, G, d] or null: queries before weights, rotation
  const T* grad;                                           // [B, N, H, d], by strides
  int64_t grad_b, grad_n, grad_h;
  const T* later;                                          // [B, N, G, d]: the queries' cotangent from rows >= stop
  const T* allowed;                                        // [B]: tolerance
  T* lam;                                                  // [B, n, H, d]
  T* made;                                                 // [B, n, G d]: cotangent of what Omega_Q makes
  T* d_key;                                                // [B, H, n, d]
  T* d_value;                                              // [B, G, n, d]
  T* own_slope;                                            // [B, H, n]: cotangent of the own scores
  T* slope;                                                // [B, H, n, n] or null: of all scores; comes in as zeros
  T* residual;                                             // [B]
  T* gain;                                                 // [B, n, H, H]: own Jacobians of suspects
  int64_t* suspect;                                        // [B, n]: rows whose gain may be near 1; zeros come in
  int64_t* sweeps;                                         // [B]
  int64_t* solved;                                         // [B]: 1 or 0
  double scale, norm, near_singular;                       // norm: the largest |Omega_Q e_j|
};

}  // namespace implicit_attention
