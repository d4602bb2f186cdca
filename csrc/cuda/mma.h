// Products of tiles on tensor cores: bf16 or fp16 operands from shared memory, float sums in registers.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/launch.h"

namespace vitkernels::cuda {

template <class Element>
struct TensorCore;
template <>
struct TensorCore<cutlass::bfloat16_t> {
  using Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};
template <>
struct TensorCore<cutlass::half_t> {
  using Atom = cute::SM80_16x8x16_F32F16F16F32_TN;
};

inline constexpr int kDepthOfStep = 16;

// Warps stacked along the rows of the result. A step takes 16 columns, two instructions wide, so that one ldmatrix of
// four matrices feeds it.
template <class Element, int kWarps>
using TileMma = cute::TiledMMA<cute::MMA_Atom<typename TensorCore<Element>::Atom>,
                               cute::Layout<cute::Shape<cute::Int<kWarps>, cute::_1, cute::_1>>,
                               cute::Tile<cute::Int<16 * kWarps>, cute::_16, cute::_16>>;

// From shared memory to the registers of an operand whose depth is contiguous (x4), four 8x8 matrices at a time.
template <class Element>
using OperandCopy = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;

// Operands whose depth is not contiguous are transposed on their way.
template <class Element>
using TransposedOperandCopy = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;

// sums += a b^T for one tile, over the first `depth` columns. `sA` is (rows, depth), `sB` is (columns, depth), both in
// shared memory and zero behind the depth.
template <class Mma, class Sums, class TileA, class TileB>
__device__ void multiply_tile(const Mma& mma, Sums& sums, const TileA& sA, const TileB& sB, int depth) {
  using Element = typename TileA::value_type;
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor rA = thread.partition_fragment_A(sA);  // (MMA,MMA_M,MMA_K)
  cute::Tensor rB = thread.partition_fragment_B(sB);  // (MMA,MMA_N,MMA_K)

  const auto copy_a = cute::make_tiled_copy_A(OperandCopy<Element>{}, mma).get_slice(threadIdx.x);
  const auto copy_b = cute::make_tiled_copy_B(OperandCopy<Element>{}, mma).get_slice(threadIdx.x);
  cute::Tensor tAsA = copy_a.partition_S(sA);  // (CPY,CPY_M,CPY_K)
  cute::Tensor tBsB = copy_b.partition_S(sB);  // (CPY,CPY_N,CPY_K)
  cute::Tensor tArA = copy_a.retile_D(rA);     // (CPY,CPY_M,CPY_K)
  cute::Tensor tBrB = copy_b.retile_D(rB);     // (CPY,CPY_N,CPY_K)

  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(rA); ++k) {
    if (k * kDepthOfStep >= depth) break;
    cute::copy(OperandCopy<Element>{}, tAsA(cute::_, cute::_, k), tArA(cute::_, cute::_, k));
    cute::copy(OperandCopy<Element>{}, tBsB(cute::_, cute::_, k), tBrB(cute::_, cute::_, k));
    cute::gemm(mma, rA(cute::_, cute::_, k), rB(cute::_, cute::_, k), sums);
  }
}

// sums += a b, a in registers (operand A, (MMA,MMA_M,MMA_K)), `sB` (depth, columns) in shared memory; the first `columns`
// columns only.
template <class Mma, class Sums, class OperandA, class TileB>
__device__ void multiply_operand(const Mma& mma, Sums& sums, const OperandA& rA, const TileB& sB, int columns) {
  using Element = typename TileB::value_type;
  constexpr int kDepth = decltype(cute::size<0>(sB))::value, kColumns = decltype(cute::size<1>(sB))::value;
  cute::Tensor sBt = cute::make_tensor(
      sB.data(), cute::composition(sB.layout(), cute::make_layout(cute::Shape<cute::Int<kColumns>, cute::Int<kDepth>>{},
                                                                  cute::LayoutRight{})));  // (columns,depth)
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor rB = thread.partition_fragment_B(sBt);  // (MMA,MMA_N,MMA_K)
  const auto copy = cute::make_tiled_copy_B(TransposedOperandCopy<Element>{}, mma).get_slice(threadIdx.x);
  cute::Tensor tBsB = copy.partition_S(sBt);  // (CPY,CPY_N,CPY_K)
  cute::Tensor tBrB = copy.retile_D(rB);      // (CPY,CPY_N,CPY_K)

  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(rA); ++k) {
    CUTE_UNROLL
    for (int n = 0; n < cute::size<1>(tBrB); ++n) {
      constexpr int kColumnsOfCopy = kColumns / decltype(cute::size<1>(tBrB))::value;
      if (n * kColumnsOfCopy < columns) {
        cute::copy(TransposedOperandCopy<Element>{}, tBsB(cute::_, n, k), tBrB(cute::_, n, k));
      } else {
        cute::clear(tBrB(cute::_, n, k));
      }
    }
    cute::gemm(mma, rA(cute::_, cute::_, k), rB(cute::_, cute::_, k), sums);
  }
}

}  // namespace vitkernels::cuda
