// Memory of one task. Every part is allocated on its own, so that AddressSanitizer sees where each of them ends.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "simd.h"

namespace implicit_attention::CAPABILITY {

// Zero-filled numbers, aligned to cache lines.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T) + 1, std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

constexpr int64_t R = 4;        // rows that are solved together
constexpr int64_t kBlock = 64;  // rows and columns of a tile of scores

// Sizes of a call that both directions share.
template <class T>
struct Sizes {
  int64_t batch, heads, groups, shared, length, dim, first;
  int64_t n;        // rows of this call
  int64_t blocks;   // of kBlock rows
  int64_t rows;     // n, with room for a last group of R
  int64_t padded;   // d, in whole panels
  int64_t hvec;     // H, in whole vectors

  template <class Arguments>
  explicit Sizes(const Arguments& a)
      : batch(a.batch), heads(a.heads), groups(a.groups), shared(a.heads / a.groups), length(a.length), dim(a.dim),
        first(a.first), n(a.stop - a.first), blocks((n + kBlock - 1) / kBlock), rows(n + R), padded(round_up<T>(a.dim, kPanel<T>)),
        hvec(round_up<T>(a.heads)) {}
};

}  // namespace implicit_attention::CAPABILITY
