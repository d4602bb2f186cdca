// Products of whole tiles of 16-bit elements whose operand A is in registers, all of it.
#pragma once

#include "cuda/mma.h"

namespace vitkernels::cuda {

// acc += a b^T, `sB` (columns,depth) read through `atom`, a step ahead. A fragment of it serves all rows before the next,
// so that few live at a time: multiply_steps takes row after row, with more registers at 128 columns.
template <class Mma, class Atom, class Acc, class OperandA, class TileB>
__device__ __forceinline__ void multiply_held_steps(const Mma& mma, const Atom& atom, Acc& acc, const OperandA& rA,
                                                    const TileB& sB) {
  using Element = typename TileB::value_type;
  const auto copy = cute::make_tiled_copy_B(atom, mma).get_slice(threadIdx.x);
  cute::Tensor rB =
      cute::make_fragment_like<Element>(mma.get_slice(threadIdx.x).partition_fragment_B(sB));  // (MMA,MMA_N,MMA_K)
  cute::Tensor tBsB = copy.partition_S(sB);                                                    // (CPY,CPY_N,CPY_K)
  cute::Tensor tBrB = copy.retile_D(rB);                                                       // (CPY,CPY_N,CPY_K)
  const auto read = [&](int k) { cute::copy(atom, tBsB(cute::_, cute::_, k), tBrB(cute::_, cute::_, k)); };
  read(0);
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(rA); ++k) {
    if (k + 1 < cute::size<2>(rA)) read(k + 1);
    cute::gemm(mma, rA(cute::_, cute::_, k), rB(cute::_, cute::_, k), acc);
  }
}

// acc += a b, `sB` (depth,columns).
template <class Mma, class Acc, class OperandA, class TileB>
__device__ __forceinline__ void multiply_held_transposed(const Mma& mma, Acc& acc, const OperandA& rA,
                                                         const TileB& sB) {
  multiply_held_steps(mma, typename Mma::CopyTransposedB{}, acc, rA, transposed(sB));
}

}  // namespace vitkernels::cuda
