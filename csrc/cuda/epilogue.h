// The way out: results in registers become rows in global memory, through shared memory that nobody reads any more.
#pragma once

#include "cuda/fragments.h"
#include "cuda/launch.h"

namespace vitkernels::cuda {

// rows x columns of `sT` to rows `stride` apart.
template <int kThreads, class Shared, class Element>
__device__ void copy_rows_to_global(const Shared& sT, Element* target, int64_t stride, int rows, int columns,
                                    bool aligned) {
  constexpr int kVector = 16 / sizeof(Element), kColumns = decltype(cute::size<1>(sT))::value;
  constexpr int kVectors = kColumns / kVector, kRows = decltype(cute::size<0>(sT))::value;
  CUTE_UNROLL
  for (int first = 0; first < kRows * kVectors; first += kThreads) {
    const int i = first + int(threadIdx.x), row = i / kVectors, column = i % kVectors * kVector;
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

// Sums (rows,columns) as they are, straight from the registers: of each row a quad of threads writes whole sectors.
// `coordinates` gives the (row,column) of each in the tile.
template <class Sums, class Coordinates>
__device__ void store_sums(const Sums& sums, const Coordinates& coordinates, float* target, int64_t stride, int rows,
                           int columns) {
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(sums); ++r) {
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(sums); ++c) {
      const int row = cute::get<0>(coordinates(r, c)), column = cute::get<1>(coordinates(r, c));
      if (row < rows && column < columns) target[row * stride + column] = sums(r, c);
    }
  }
}

// The sums `rC` of a tile, rounded, to `rows` x `columns` elements at `target`, through `sC`.
template <int kThreads, class Mma, class Sums, class Shared, class Element>
__device__ void store_tile(const Mma& mma, const Sums& rC, Shared& sC, Element* target, int64_t stride, int rows,
                           int columns, bool aligned) {
  __syncthreads();                                                 // nobody reads what was there before
  cute::Tensor tCsC = mma.get_slice(threadIdx.x).partition_C(sC);  // (MMA,MMA_M,MMA_N)
  cute::copy(cute::AutoVectorizingCopy{}, convert<Element>(rC), tCsC);
  __syncthreads();
  copy_rows_to_global<kThreads>(sC, target, stride, rows, columns, aligned);
}

}  // namespace vitkernels::cuda
