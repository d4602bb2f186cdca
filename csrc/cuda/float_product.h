// Products of small matrices in float32 without tensor cores, where the work is little and operands must not be
// rounded.
#pragma once

#include "cuda/launch.h"

namespace vitkernels::cuda {

// A block's tile of a product. Operands are functions of their coordinates: they may be gathered, widened or zero.
struct FloatProduct {
  static constexpr int kRows = 64, kColumns = 64, kDepth = 16, kThreads = 128;
  static constexpr int kRowsOfThread = 8, kColumnsOfThread = 4;
  static constexpr int kBlocks = 3;  // of a multiprocessor; left to itself the compiler aims at 4, and spills

  struct Shared {
    alignas(16) float a[kDepth][kRows + 4], b[kDepth][kColumns + 4];
  };

  float acc[kRowsOfThread][kColumnsOfThread] = {};

  static __device__ int first_row() { return int(threadIdx.x) / (kColumns / kColumnsOfThread) * kRowsOfThread; }
  static __device__ int first_column() { return int(threadIdx.x) % (kColumns / kColumnsOfThread) * kColumnsOfThread; }

  // acc += the product over kDepth of a(row, depth) and b(depth, column). Where an operand's depth is contiguous in
  // memory, neighbouring threads take neighbours in depth.
  template <bool kDepthIsContiguousInA, bool kDepthIsContiguousInB, class A, class B>
  __device__ void add(Shared& shared, A&& a, B&& b) {
    __syncthreads();  // all reads of the previous operands are done
    for (int i = threadIdx.x; i < kDepth * kRows; i += kThreads) {
      const int depth = kDepthIsContiguousInA ? i % kDepth : i / kRows;
      const int row = kDepthIsContiguousInA ? i / kDepth : i % kRows;
      shared.a[depth][row] = a(row, depth);
    }
    for (int i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
      const int depth = kDepthIsContiguousInB ? i % kDepth : i / kColumns;
      const int column = kDepthIsContiguousInB ? i / kDepth : i % kColumns;
      shared.b[depth][column] = b(depth, column);
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
        for (int c = 0; c < kColumnsOfThread; ++c) {
          acc[r][c] += shared.a[depth][first_row() + r] * shared.b[depth][first_column() + c];
        }
      }
    }
  }

  // Calls f(row, column, sum).
  template <class Function>
  __device__ void for_each(Function&& f) const {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
      for (int c = 0; c < kColumnsOfThread; ++c) f(first_row() + r, first_column() + c, acc[r][c]);
    }
  }
};

}  // namespace vitkernels::cuda
