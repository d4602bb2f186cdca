// Consecutive tiles of a tensor's rows on their way to shared memory: running pointers, bounds in the last tile only.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/copy.h"

namespace vitkernels::cuda {

// The share of a thread in copying tiles of kRows x kColumns with kThreads threads, 16 bytes at a time, from the last
// row to the first. Rows are aligned.
template <class T, int kThreads, int kRows, int kColumns>
class TileStream {
 public:
  using Element = T;

 private:
  using Copy = TileCopy<Element, kThreads, kColumns>;
  static constexpr int kRowsOfStep = kThreads / Copy::kThreadsOfRow, kSteps = kRows / kRowsOfStep;
  static_assert(kRows % kRowsOfStep == 0);

 public:
  // `rows` is the first of the last tile. `columns` exist; those past them become zero.
  __device__ TileStream(const Element* rows, int64_t stride, int columns)
      : step_(unsigned(stride) * unsigned(kRowsOfStep * sizeof(Element))), exists_(column() < columns) {
    const int64_t last = row() + (kSteps - 1) * kRowsOfStep;
    next_ = reinterpret_cast<const char*>(rows + last * stride + column());
  }

  // Starts the copy of the next tile, of which `rows` exist; the others become zero.
  template <class Shared>
  __device__ void start_some(const Shared& sT, int rows) {
    start(sT, [&](int step) { return row() + step * kRowsOfStep < rows; });
  }
  // The same of a whole tile.
  template <class Shared>
  __device__ void start_whole(const Shared& sT) {
    start(sT, [](int) { return true; });
  }

 private:
  static constexpr int kVectorBytes = 16;

  // Of indices of their own, so that they do not live in registers across a loop.
  static __device__ int row() { return thread_index() % kThreads / Copy::kThreadsOfRow; }
  static __device__ int column() { return thread_index() % Copy::kThreadsOfRow * Copy::kVector; }

  template <class Shared, class Exists>
  __device__ void start(const Shared& sT, Exists&& exists) {
    cute::Tensor tsT = typename Copy::Copy{}.get_slice(threadIdx.x % kThreads).partition_D(sT);  // (CPY,CPY_M,CPY_K)
    CUTE_UNROLL
    for (int m = kSteps - 1; m >= 0; --m) {
      copy_16_bytes(&tsT(0, m, 0), next_, exists(m) && exists_ ? kVectorBytes : 0);
      next_ -= step_;
    }
  }

  const char* next_;  // this thread's next vector
  unsigned step_;     // to the one before, in bytes
  bool exists_;
};

}  // namespace vitkernels::cuda
