// The kernels for one instruction set: build.py compiles this file once for each, with CAPABILITY set to its name.
#include "kernels.h"

#include "adjoint_substitution.h"
#include "feedback_adjoint.h"
#include "feedback_forward.h"
#include "forward_row.h"

namespace implicit_attention::CAPABILITY {

// Omega_Q [G d, H d] packed for the forward pass, [G, H, padded / panel (of q), d (of y), panel (of q)].
template <class T>
void pack_forward(const T* weight, const Sizes<T>& z, T* packed) {
  auto task = [&](int64_t g) {
    for (int64_t q = 0; q < z.dim; ++q) {
      const T* row = weight + (g * z.dim + q) * z.heads * z.dim;
      T* panel = packed + g * z.heads * z.dim * z.padded + q / kPanel<T> * z.dim * kPanel<T> + q % kPanel<T>;
      for (int64_t h = 0; h < z.heads; ++h, panel += z.dim * z.padded)
        for (int64_t y = 0; y < z.dim; ++y) panel[y * kPanel<T>] = row[h * z.dim + y];
    }
  };
  parallel_for(z.groups, task);
}

// The same for the adjoint, [H, padded / panel (of y), G d (of q), panel (of y)].
template <class T>
void pack_adjoint(const T* weight, const Sizes<T>& z, T* packed) {
  const int64_t size = z.groups * z.dim;
  auto task = [&](int64_t h) {
    for (int64_t q = 0; q < size; ++q)
      for (int64_t y = 0; y < z.dim; y += kPanel<T>)
        copy(packed + h * size * z.padded + (y * size + q * kPanel<T>), weight + (q * z.heads + h) * z.dim + y,
             std::min(kPanel<T>, z.dim - y));
  };
  parallel_for(z.heads, task);
}

template <class T>
void forward(const ForwardArguments<T>& a) {
  const Sizes<T> z(a);
  Buffer<T> packed(a.weight == nullptr ? 0 : z.groups * z.heads * z.dim * z.padded);
  if (a.weight != nullptr) pack_forward<T>(a.weight, z, packed);
  const T* weight = a.weight == nullptr ? nullptr : static_cast<T*>(packed);
  for_each_sample(z.batch, a.threads, z.groups, z.heads * z.groups * z.dim * z.dim, [&](int64_t b, Team team) {
    ForwardScratch<T> scratch(z, a.inverse != nullptr);
    a.settled[b] = ForwardSample<T>(a, z, weight, scratch, team, b).solve();
  });
}

template <class T>
void adjoint(const AdjointArguments<T>& a) {
  const Sizes<T> z(a);
  Buffer<T> packed(a.weight == nullptr ? 0 : z.groups * z.heads * z.dim * z.padded);
  if (a.weight != nullptr) pack_adjoint<T>(a.weight, z, packed);
  const T* weight = a.weight == nullptr ? nullptr : static_cast<T*>(packed);
  for_each_sample(z.batch, a.threads, z.groups, z.heads * z.groups * z.dim * z.dim, [&](int64_t b, Team team) {
    AdjointScratch<T> scratch(z);
    a.solved[b] = AdjointSample<T>(a, z, weight, scratch, team, b).solve();
  });
}

const Kernels& kernels() {
  static const Kernels table{forward<float>, forward<double>, adjoint<float>, adjoint<double>,
                             feedback_forward<float>, feedback_forward<double>, feedback_adjoint<float>,
                             feedback_adjoint<double>};
  return table;
}

}  // namespace implicit_attention::CAPABILITY
