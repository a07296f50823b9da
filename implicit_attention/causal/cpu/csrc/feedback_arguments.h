// What the caller hands over for maps whose values read outputs; `library.py` mirrors both structs, field by field.
//
// Fields are as in arguments.h, eight bytes each.
#pragma once

#include <cstdint>

namespace implicit_attention {

template <class T>
struct FeedbackForwardArguments {
  int64_t bytes;
  int64_t threads;
  int64_t batch, heads, groups, length, dim, first, stop;
  const T* key;                                            // [B, H, N, d]
  int64_t key_b, key_h, key_n;
  const T* value;                                          // [B, G, N, d]: of a row's own column
  int64_t value_b, value_g, value_n;
  const T* weight;                                         // Omega_Q [G d, H d] or null: queries read no outputs
  const T* constant;                                       // [G d] or null
  const T* added;                                          // [B, N, G d] or null
  const T* cosine;                                         // [1 or B, N, d / 2] or null
  const T* sine;
  int64_t turn_b;
  const T* own_score;                                      // [B, H, N]
  const T* bias;                                           // [1 or B, 1 or H, n, n] or null
  int64_t bias_b, bias_h;
  const T* keep;                                           // [B, H, n, n] or null
  const T* feedback;                                       // Psi_V [G d, H d]
  const T* feedback_bias;                                  // [G d] or null
  int64_t normed;                                          // whether Psi_V reads y over its root mean square
  T* y;                                                    // [B, N, H, d]: in, attention to columns before `first`
  T* lse;                                                  // [B, H, N]: likewise
  T* query;                                                // [B, N, G, d]
  T* inverse;                                              // [B, N, G] or null
  T* seen;                                                 // [B, N, G, d]: the values that later rows see
  double scale, eps;
};

template <class T>
struct FeedbackAdjointArguments {
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
  const T* feedback;
  int64_t normed;
  const T* y;
  const T* lse;
  const T* query;
  const T* inverse;
  const T* seen;
  const T* grad;                                           // [B, N, H, d], by strides
  int64_t grad_b, grad_n, grad_h;
  const T* d_query;                                        // [B, N, G, d]: from rows >= stop
  T* d_seen;                                               // [B, N, G, d]: in, from rows >= stop; out, from all
  T* lam;                                                  // [B, N, H, d]
  T* made;                                                 // [B, N, G d]: cotangent of what Omega_Q makes
  T* d_key;                                                // [B, H, N, d]
  T* d_own_value;                                          // [B, G, N, d]: of a row's own column
  T* own_slope;                                            // [B, H, N]
  T* slope;                                                // [B, H, n, n] or null: of all scores; comes in as zeros
  double scale, eps;
};

}  // namespace implicit_attention
