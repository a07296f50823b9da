// The threads of torch, by its C interface (`torch_parallel_for`, exported since 2.10).
//
// A second pool of threads would fight torch's for the same cores. The caller hands over the function's address, so this
// library links with nothing of torch. How many threads really run is torch's and OpenMP's business: every task owns its
// scratch, and phases end when the call returns, so that fewer threads than asked for change the time alone.
#pragma once

#include <cstdint>

namespace implicit_attention {

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*task)(int64_t, int64_t, void*),
                                void* context);

extern ParallelFor parallel_for_of_torch;  // null: everything runs on the calling thread

// An exception of a task, or of torch itself.
struct ParallelError {};

namespace {  // one copy per file: files are compiled for different instruction sets

// Call `task(i)` for every i < count.
template <class Task>
void parallel_for(int64_t count, Task& task) {
  if (parallel_for_of_torch == nullptr) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<Task*>(context))(i);
  };
  if (parallel_for_of_torch(0, count, 1, range, &task) != 0) throw ParallelError{};
}

// What works on one sample: the calling thread alone, or all threads, phase by phase.
struct Team {
  bool parallel;

  template <class Task>
  void each(int64_t count, Task task) const {
    if (parallel && count > 1) {
      parallel_for(count, task);
    } else {
      for (int64_t i = 0; i < count; ++i) task(i);
    }
  }
};

constexpr int64_t kWorthSharing = 1 << 16;  // entries of Omega_Q from which a phase takes longer than to start threads

// Deal samples to threads; where their number does not divide, all threads share each of those that are left.
template <class Sample>
void for_each_sample(int64_t batch, int64_t threads, int64_t groups, int64_t entries, Sample sample) {
  const bool shares = threads > 1 && groups > 1 && entries >= kWorthSharing;
  const int64_t left = shares ? batch % threads : 0;
  auto alone = [&](int64_t b) { sample(b, Team{false}); };
  if (batch > left) parallel_for(batch - left, alone);
  for (int64_t b = batch - left; b < batch; ++b) sample(b, Team{true});
}

}  // namespace
}  // namespace implicit_attention
