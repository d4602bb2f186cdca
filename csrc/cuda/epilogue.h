// The epilogue: accumulators become rows in global memory, through shared memory that is free by then.
#pragma once

#include "cuda/fragments.h"
#include "cuda/launch.h"

namespace vitkernels::cuda {

// Copies rows x columns of `sT` to rows `stride` apart, with kThreads threads in a row.
template <int kThreads, class Shared, class Element>
__device__ void copy_rows_to_global(const Shared& sT, Element* target, int64_t stride, int rows, int columns,
                                    bool aligned) {
  constexpr int kVector = 16 / sizeof(Element), kColumns = decltype(cute::size<1>(sT))::value;
  constexpr int kVectors = kColumns / kVector, kRows = decltype(cute::size<0>(sT))::value;
  const int thread = thread_index() % kThreads;
  CUTE_UNROLL
  for (int first = 0; first < kRows * kVectors; first += kThreads) {
    const int i = first + thread, row = i / kVectors, column = i % kVectors * kVector;
    if (i >= kRows * kVectors || row >= rows || column >= columns) continue;
    const Element* from = &sT(row, column);
    Element* to = target + row * stride + column;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int c = 0; c < kVector && column + c < columns; ++c) to[c] = from[c];
    }
  }
}

// Rounds two neighbouring elements of a row, which begins at a multiple of their size, and stores them if they exist:
// without a branch, behind which the compiler would take the lanes of a warp for diverged.
template <class Element>
__device__ void store_pair_if(bool exists, Element* to, float first, float second) {
  const cutlass::Array<float, 2> pair{first, second};
  const auto rounded = cutlass::NumericArrayConverter<Element, float, 2>::convert(pair);
  asm volatile("{ .reg .pred exists; setp.ne.s32 exists, %0, 0; @exists st.global.b32 [%1], %2; }" ::"r"(int(exists)),
               "l"(to), "r"(reinterpret_cast<const uint32_t&>(rounded))
               : "memory");
}

// Stores accumulators (rows,columns) in float32, straight from registers: a quad of threads writes whole sectors of a
// row. `coordinates` gives the (row,column) of each in the tile.
template <class Acc, class Coordinates>
__device__ void store_acc(const Acc& acc, const Coordinates& coordinates, float* target, int64_t stride, int rows,
                          int columns) {
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(acc); ++r) {
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(acc); ++c) {
      const int row = cute::get<0>(coordinates(r, c)), column = cute::get<1>(coordinates(r, c));
      if (row < rows && column < columns) target[row * stride + column] = acc(r, c);
    }
  }
}

// Rounds the accumulators `rC` of a tile and stores `rows` x `columns` elements at `target`, through `sC`.
template <int kThreads, class Mma, class Acc, class Shared, class Element>
__device__ void store_tile(const Mma& mma, const Acc& rC, Shared& sC, Element* target, int64_t stride, int rows,
                           int columns, bool aligned) {
  __syncthreads();  // all reads of the tile's previous contents are done
  cute::Tensor tCsC = mma.get_slice(thread_index()).partition_C(sC);  // (MMA,MMA_M,MMA_N)
  cute::copy(cute::AutoVectorizingCopy{}, convert<Element>(rC), tCsC);
  __syncthreads();
  copy_rows_to_global<kThreads>(sC, target, stride, rows, columns, aligned);
}

}  // namespace vitkernels::cuda
