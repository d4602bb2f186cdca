// Consecutive tiles of a tensor's rows on their way to shared memory: running pointers, and bounds in the last tile only.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/copy.h"

namespace vitkernels::cuda {

// The share of a thread in copying tiles of kRows x kColumns with kThreads threads, 16 bytes at a time, from the last tile
// to the first. Rows are aligned.
template <class Element, int kThreads, int kRows, int kColumns>
class TileStream {
  using Copy = TileCopy<Element, kThreads, kColumns>;
  static constexpr int kRowsOfStep = kThreads / Copy::kThreadsOfRow, kSteps = kRows / kRowsOfStep;
  static_assert(kRows % kRowsOfStep == 0);

 public:
  // `rows` is the first of the last tile. `columns` exist; those past them become zero.
  __device__ TileStream(const Element* rows, int64_t stride, int columns)
      : stride_(unsigned(stride) * unsigned(sizeof(Element))) {
    const unsigned column = threadIdx.x % Copy::kThreadsOfRow * Copy::kVector;
    // Of an index of its own, so that the column does not live in registers for comparisons in a loop.
    bytes_ = thread_index() % Copy::kThreadsOfRow * Copy::kVector < columns ? kVectorBytes : 0;
    next_ = reinterpret_cast<const char*>(rows + column) + uint64_t(row()) * stride_;
  }

  // Starts the copy of the next tile, of which `rows` exist; the others become zero.
  template <class Shared>
  __device__ void start_some(const Shared& sT, int rows) {
    start(sT, [&](int step) { return row() + step * kRowsOfStep < rows ? bytes_ : 0; });
  }
  // The same of a whole tile.
  template <class Shared>
  __device__ void start_whole(const Shared& sT) {
    start(sT, [&](int) { return bytes_; });
  }

 private:
  static constexpr int kVectorBytes = 16;

  static __device__ int row() { return int(threadIdx.x) % kThreads / Copy::kThreadsOfRow; }

  template <class Shared, class Bytes>
  __device__ void start(const Shared& sT, Bytes&& bytes) {
    cute::Tensor tsT = typename Copy::Copy{}.get_slice(threadIdx.x % kThreads).partition_D(sT);  // (CPY,CPY_M,CPY_K)
    CUTE_UNROLL
    for (int m = 0; m < kSteps; ++m)
      copy_16_bytes(&tsT(0, m, 0), next_ + unsigned(m * kRowsOfStep) * stride_, bytes(m));
    next_ -= unsigned(kRows) * stride_;
  }

  // `bytes` of them are read, the others become zero.
  static __device__ void copy_16_bytes(const Element* shared, const char* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cute::cast_smem_ptr_to_uint(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  }

  const char* next_;  // this thread's first vector of the next tile
  unsigned stride_;   // in bytes. Offsets without a sign need one register, not two
  int bytes_;
};

}  // namespace vitkernels::cuda
