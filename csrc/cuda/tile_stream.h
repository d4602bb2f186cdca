// Consecutive tiles of a tensor's rows on their way to shared memory: running pointers, and bounds in the last tile only.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/copy.h"

namespace vitkernels::cuda {

// The share of a thread in copying tiles of kRows x kColumns with kThreads threads, 16 bytes at a time, from the last tile
// to the first. Rows are aligned. If kIsLean, what a copy needs besides a pointer is computed for each tile, with fewer
// registers.
template <class T, int kThreads, int kRows, int kColumns, bool kIsLean = true>
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
      : stride_(unsigned(stride) * unsigned(sizeof(Element))), columns_(kIsLean ? columns : bytes_of_row(columns)) {
    const int column = int(threadIdx.x) % Copy::kThreadsOfRow * Copy::kVector;
    next_ = reinterpret_cast<const char*>(rows + column) + uint64_t(row()) * stride_;
  }

  // Starts the copy of the next tile, of which `rows` exist; the others become zero.
  template <class Shared>
  __device__ void start_some(const Shared& sT, int rows) {
    start(sT, [&](int step, int bytes) { return row() + step * kRowsOfStep < rows ? bytes : 0; });
  }
  // The same of a whole tile.
  template <class Shared>
  __device__ void start_whole(const Shared& sT) {
    start(sT, [](int, int bytes) { return bytes; });
  }

 private:
  static constexpr int kVectorBytes = 16;

  // Of indices of their own, so that they do not live in registers across a loop.
  static __device__ int row() { return thread_index() % kThreads / Copy::kThreadsOfRow; }
  static __device__ int bytes_of_row(int columns) { return column() < columns ? kVectorBytes : 0; }
  static __device__ int column() { return thread_index() % Copy::kThreadsOfRow * Copy::kVector; }

  template <class Shared, class Bytes>
  __device__ void start(const Shared& sT, Bytes&& bytes) {
    cute::Tensor tsT = typename Copy::Copy{}.get_slice(threadIdx.x % kThreads).partition_D(sT);  // (CPY,CPY_M,CPY_K)
    const int row_bytes = kIsLean ? bytes_of_row(columns_) : columns_;
    const uint64_t stride = kIsLean ? computed_here(stride_) : stride_;  // or its multiples live in registers, too
    CUTE_UNROLL
    for (int m = 0; m < kSteps; ++m) {
      copy_16_bytes(&tsT(0, m, 0), next_ + m * kRowsOfStep * stride, bytes(m, row_bytes));
    }
    next_ -= kRows * stride;
  }

  const char* next_;  // this thread's first vector of the next tile
  unsigned stride_;   // in bytes
  int columns_;       // or the bytes of the thread's vector that exist
};

}  // namespace vitkernels::cuda
