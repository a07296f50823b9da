// What the library exports, and which instruction set it uses. No symbol of torch or Python is needed.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "row_solver.h"
#include "threads.h"

namespace implicit_attention {

ParallelFor parallel_for_of_torch = nullptr;

namespace {

struct Capability {
  const char* name;
  const Kernels& (*kernels)();
  bool (*supported)();
};

// The last one that the processor has is taken.
const Capability kCapabilities[] = {
    {"baseline", baseline::kernels, [] { return true; }},
#if defined(__x86_64__) && !defined(ONE_CAPABILITY)
    {"avx2", avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};

std::atomic<const Capability*> chosen{nullptr};

// Several threads may come here at once: each finds the same, and stores nothing in between.
const Capability& capability() {
  const Capability* found = chosen.load();
  if (found == nullptr) {
    for (const Capability& one : kCapabilities)
      if (one.supported()) found = &one;
    chosen.store(found);
  }
  return *found;
}

enum Status : int32_t { kDone = 0, kWrongStruct = 1, kFailed = 2 };

template <class Arguments>
int32_t run(void (*kernel)(const Arguments&), const Arguments& a) {
  if (a.bytes != sizeof(Arguments)) return kWrongStruct;
  try {
    kernel(a);
  } catch (...) {  // no memory; an exception must not leave a C function
    return kFailed;
  }
  return kDone;
}

}  // namespace
}  // namespace implicit_attention

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace implicit_attention;

// Take the address of torch's `torch_parallel_for`; null for one thread.
EXPORT void implicit_attention_use_threads(ParallelFor function) { parallel_for_of_torch = function; }

// Which sources the library was built from (`build.fingerprint`).
EXPORT const char* implicit_attention_sources() { return SOURCES; }

// The instruction set in use.
EXPORT const char* implicit_attention_capability() { return capability().name; }

// Use an instruction set by name; returns whether this library and the processor have it.
EXPORT int32_t implicit_attention_use_capability(const char* name) {
  for (const Capability& one : kCapabilities) {
    if (std::strcmp(one.name, name) == 0 && one.supported()) {
      chosen.store(&one);
      return 1;
    }
  }
  return 0;
}

EXPORT int32_t implicit_attention_forward32(const ForwardArguments<float>* a) {
  return run(capability().kernels().forward32, *a);
}

EXPORT int32_t implicit_attention_forward64(const ForwardArguments<double>* a) {
  return run(capability().kernels().forward64, *a);
}

EXPORT int32_t implicit_attention_adjoint32(const AdjointArguments<float>* a) {
  return run(capability().kernels().adjoint32, *a);
}

EXPORT int32_t implicit_attention_adjoint64(const AdjointArguments<double>* a) {
  return run(capability().kernels().adjoint64, *a);
}

EXPORT int32_t implicit_attention_feedback_forward32(const FeedbackForwardArguments<float>* a) {
  return run(capability().kernels().feedback_forward32, *a);
}

EXPORT int32_t implicit_attention_feedback_forward64(const FeedbackForwardArguments<double>* a) {
  return run(capability().kernels().feedback_forward64, *a);
}

EXPORT int32_t implicit_attention_feedback_adjoint32(const FeedbackAdjointArguments<float>* a) {
  return run(capability().kernels().feedback_adjoint32, *a);
}

EXPORT int32_t implicit_attention_feedback_adjoint64(const FeedbackAdjointArguments<double>* a) {
  return run(capability().kernels().feedback_adjoint64, *a);
}

// One row's own equation, for tests; the arrays are those of RowSolver.
EXPORT int32_t implicit_attention_solve_row(int64_t heads, int64_t grams, const double* alpha, const double* beta,
                                            const double* offset, const double* gram, double* p) {
  RowSolver solver(heads, grams);
  std::memcpy(solver.alpha(), alpha, heads * sizeof(double));
  std::memcpy(solver.beta(), beta, heads * heads * sizeof(double));
  std::memcpy(solver.offset(), offset, heads * sizeof(double));
  if (grams > 0) std::memcpy(solver.gram(0), gram, grams * (heads + 1) * (heads + 1) * sizeof(double));
  return solver.solve(p);
}
