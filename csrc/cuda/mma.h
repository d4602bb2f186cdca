// Products of tiles on tensor cores: operands in shared memory or registers, float accumulators in registers.
#pragma once

#include <cute/tensor.hpp>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/precision.h"

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
template <>
struct TensorCore<float> {
  using Atom = cute::SM80_16x8x8_F32TF32TF32F32_TN;
};

template <class Element>
inline constexpr int kDepthOfStep = 32 / sizeof(Element);

// Warps are stacked along M. A step takes 16 columns, two instructions wide, so that one ldmatrix of
// four matrices feeds it; or 8, where a tile has no more.
template <class Element, int kWarps, int kColumns = 16>
struct TileMma
    : cute::TiledMMA<cute::MMA_Atom<typename TensorCore<Element>::Atom>,
                     cute::Layout<cute::Shape<cute::Int<kWarps>, cute::_1, cute::_1>>,
                     cute::Tile<cute::Int<16 * kWarps>, cute::Int<kColumns>, cute::Int<kDepthOfStep<Element>>>> {
  // From shared memory to an operand fragment whose depth is contiguous: 8 rows of 16 bytes a matrix.
  using CopyA = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
  using CopyB =
      cute::Copy_Atom<std::conditional_t<kColumns == 16, cute::SM75_U32x4_LDSM_N, cute::SM75_U32x2_LDSM_N>, Element>;
  // Operands whose depth is not contiguous are transposed on the way. ldmatrix does that for 16-bit elements only.
  using CopyTransposedB =
      cute::Copy_Atom<std::conditional_t<sizeof(Element) == 2, cute::SM75_U16x8_LDSM_T, cute::UniversalCopy<Element>>,
                      Element>;
  using CopyTransposedA = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;

  bool allow_tf32;  // of float

  __device__ explicit TileMma(bool allow_tf32) : allow_tf32(allow_tf32) {}
};

// acc += a b^T for one tile, over the first `depth` columns. `sA` is (rows, depth), `sB` is (columns, depth), both in
// shared memory and zero behind the depth. A warp has sixteen rows.
template <class Mma, class Acc, class TileA, class TileB>
__device__ __forceinline__ void multiply_tile(const Mma& mma, Acc& acc, const TileA& sA, const TileB& sB, int depth) {
  using Element = typename TileA::value_type;
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor rA = cute::make_fragment_like<Element>(thread.partition_fragment_A(sA));  // (MMA,MMA_M,MMA_K)
  cute::Tensor rB = cute::make_fragment_like<Element>(thread.partition_fragment_B(sB));  // (MMA,MMA_N,MMA_K)

  const typename Mma::CopyA atom_a;
  const typename Mma::CopyB atom_b;
  const auto copy_a = cute::make_tiled_copy_A(atom_a, mma).get_slice(threadIdx.x);
  const auto copy_b = cute::make_tiled_copy_B(atom_b, mma).get_slice(threadIdx.x);
  cute::Tensor tAsA = copy_a.partition_S(sA);  // (CPY,CPY_M,CPY_K)
  cute::Tensor tBsB = copy_b.partition_S(sB);  // (CPY,CPY_N,CPY_K)
  cute::Tensor tArA = copy_a.retile_D(rA);     // (CPY,CPY_M,CPY_K)
  cute::Tensor tBrB = copy_b.retile_D(rB);     // (CPY,CPY_N,CPY_K)

  with_arithmetic<Element>(mma.allow_tf32, [&](auto arithmetic) __attribute__((always_inline)) {
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(rA); ++k) {
      if (k * kDepthOfStep<Element> >= depth) break;
      cute::copy(atom_a, tAsA(cute::_, cute::_, k), tArA(cute::_, cute::_, k));
      cute::copy(atom_b, tBsB(cute::_, cute::_, k), tBrB(cute::_, cute::_, k));
      const auto a = arithmetic.prepare(rA(cute::_, 0, k));  // (MMA)
      CUTE_UNROLL
      for (int n = 0; n < cute::size<1>(rB); ++n) {
        arithmetic.multiply_add(mma, a, arithmetic.prepare(rB(cute::_, n, k)), acc(cute::_, 0, n));
      }
    }
  });
}

// (depth,columns) as (columns,depth), the depth in the order in which a thread holds the columns of an accumulator.
template <class TileB>
__device__ auto transposed(const TileB& sB) {
  constexpr int kDepth = decltype(cute::size<0>(sB))::value, kColumns = decltype(cute::size<1>(sB))::value;
  using Columns = cute::Int<kColumns>;
  if constexpr (sizeof(typename TileB::value_type) == 2) {
    using Flat = cute::Layout<cute::Shape<Columns, cute::Int<kDepth>>, cute::Stride<cute::Int<kDepth>, cute::_1>>;
    return cute::make_tensor(sB.data(), cute::composition(sB.layout(), Flat{}));
  } else {
    using Pairs = cute::Layout<cute::Shape<Columns, cute::Shape<cute::_4, cute::_2, cute::Int<kDepth / 8>>>,
                               cute::Stride<cute::Int<kDepth>, cute::Stride<cute::_2, cute::_1, cute::_8>>>;
    return cute::make_tensor(sB.data(), cute::composition(sB.layout(), Pairs{}));
  }
}

// acc += a b, a in registers (operand A, (MMA,MMA_M,MMA_K)), `sB` (depth, columns) in shared memory; the first
// `columns` columns only.
template <class Mma, class Acc, class OperandA, class TileB>
__device__ __forceinline__ void multiply_operand(const Mma& mma, Acc& acc, const OperandA& rA, const TileB& sB,
                                                 int columns) {
  using Element = typename TileB::value_type;
  const auto sBt = transposed(sB);  // (columns,depth)
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor rB = cute::make_fragment_like<Element>(thread.partition_fragment_B(sBt));  // (MMA,MMA_N,MMA_K)
  const typename Mma::CopyTransposedB atom;
  const auto copy = cute::make_tiled_copy_B(atom, mma).get_slice(threadIdx.x);
  cute::Tensor tBsB = copy.partition_S(sBt);  // (CPY,CPY_N,CPY_K)
  cute::Tensor tBrB = copy.retile_D(rB);      // (CPY,CPY_N,CPY_K)
  constexpr int kColumnsOfCopy = decltype(cute::size<1>(sB))::value / decltype(cute::size<1>(tBrB))::value;

  with_arithmetic<Element>(mma.allow_tf32, [&](auto arithmetic) __attribute__((always_inline)) {
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(rA); ++k) {
      const auto a = arithmetic.prepare(rA(cute::_, 0, k));  // (MMA)
      // The branch also keeps the compiler from hoisting more loads than registers can hold.
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(tBrB); ++c) {
        if (c * kColumnsOfCopy >= columns) break;
        cute::copy(atom, tBsB(cute::_, c, k), tBrB(cute::_, c, k));
        CUTE_UNROLL
        for (int n = c * kColumnsOfCopy / 8; n < (c + 1) * kColumnsOfCopy / 8; ++n) {
          arithmetic.multiply_add(mma, a, arithmetic.prepare(rB(cute::_, n, k)), acc(cute::_, 0, n));
        }
      }
    }
  });
}

// Products of whole tiles of 16-bit elements, without a branch: the operands of each step are read from shared memory
// while the previous step is multiplied. A warp may have several rows of instructions.

// Fragments of operand A (rows,depth) in shared memory.
template <class Mma, class TileA>
__device__ auto read_operand_a(const Mma& mma, const TileA& sA, int thread = threadIdx.x) {
  using Element = typename TileA::value_type;
  const typename Mma::CopyA atom;
  const auto copy = cute::make_tiled_copy_A(atom, mma).get_slice(thread);
  cute::Tensor rA =
      cute::make_fragment_like<Element>(mma.get_slice(thread).partition_fragment_A(sA));  // (MMA,MMA_M,MMA_K)
  cute::copy(atom, copy.partition_S(sA), copy.retile_D(rA));
  return rA;
}

// How a step goes through its instructions: a fragment of operand B serves all rows before the next one, so that few of
// them live at a time; or row after row, so that the next step's operand A can take the place of this one's.
enum class StepOrder { kByColumns, kByRows };

// acc = first + a b^T, `sB` (columns,depth) read through `atom`, a step ahead. `read_a(m, k)` reads a part of operand
// `rA`.
template <StepOrder kOrder, class Mma, class Atom, class Acc, class First, class ReadA, class OperandA, class TileB>
__device__ __forceinline__ void multiply_steps(const Mma& mma, const Atom& atom, Acc& acc, const First& first,
                                               ReadA&& read_a, const OperandA& rA, const TileB& sB) {
  using Element = typename TileB::value_type;
  constexpr int kRows = decltype(cute::size<1>(rA))::value, kSteps = decltype(cute::size<2>(rA))::value;
  const auto copy = cute::make_tiled_copy_B(atom, mma).get_slice(threadIdx.x);
  cute::Tensor rB =
      cute::make_fragment_like<Element>(mma.get_slice(threadIdx.x).partition_fragment_B(sB));  // (MMA,MMA_N,MMA_K)
  cute::Tensor tBsB = copy.partition_S(sB);                                                    // (CPY,CPY_N,CPY_K)
  cute::Tensor tBrB = copy.retile_D(rB);                                                       // (CPY,CPY_N,CPY_K)
  constexpr int kColumns = decltype(cute::size<1>(rB))::value;
  const auto read_b = [&](int k) { cute::copy(atom, tBsB(cute::_, cute::_, k), tBrB(cute::_, cute::_, k)); };
  const auto multiply = [&](int m, int n, int k) {
    if (k == 0) {
      cute::gemm(mma, acc(cute::_, m, n), rA(cute::_, m, k), rB(cute::_, n, k), first(cute::_, m, n));
    } else {
      cute::gemm(mma, rA(cute::_, m, k), rB(cute::_, n, k), acc(cute::_, m, n));
    }
  };
  read_b(0);
  CUTE_UNROLL
  for (int m = 0; m < kRows; ++m) read_a(m, 0);
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if (k + 1 < kSteps) read_b(k + 1);
    if constexpr (kOrder == StepOrder::kByColumns) {
      CUTE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < kRows; ++m) multiply(n % 2 == 0 ? m : kRows - 1 - m, n, k);
      }
    }
    CUTE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      CUTE_UNROLL
      for (int n = 0; n < kColumns && kOrder == StepOrder::kByRows; ++n) multiply(m, n, k);
      if (k + 1 < kSteps) read_a(m, k + 1);
    }
  }
}

// acc = first + a b^T, both in shared memory: `sA` (rows,depth), `sB` (columns,depth).
template <class Mma, class Acc, class First, class TileA, class TileB>
__device__ __forceinline__ void multiply_whole_tile(const Mma& mma, Acc& acc, const First& first, const TileA& sA,
                                                    const TileB& sB) {
  using Element = typename TileA::value_type;
  const typename Mma::CopyA atom;
  const auto copy = cute::make_tiled_copy_A(atom, mma).get_slice(threadIdx.x);
  cute::Tensor rA =
      cute::make_fragment_like<Element>(mma.get_slice(threadIdx.x).partition_fragment_A(sA));  // (MMA,MMA_M,MMA_K)
  cute::Tensor tAsA = copy.partition_S(sA);                                                    // (CPY,CPY_M,CPY_K)
  cute::Tensor tArA = copy.retile_D(rA);                                                       // (CPY,CPY_M,CPY_K)
  const auto read = [&](int m, int k) { cute::copy(atom, tAsA(cute::_, m, k), tArA(cute::_, m, k)); };
  multiply_steps<StepOrder::kByRows>(mma, typename Mma::CopyB{}, acc, first, read, rA, sB);
}

template <class Mma, class Acc, class TileA, class TileB>
__device__ __forceinline__ void multiply_whole_tile(const Mma& mma, Acc& acc, const TileA& sA, const TileB& sB) {
  multiply_whole_tile(mma, acc, acc, sA, sB);
}

// The same over the first `depth` columns, rounded up to whole steps.
template <class Mma, class Acc, class TileA, class TileB>
__device__ __forceinline__ void multiply_first_columns(const Mma& mma, Acc& acc, const TileA& sA, const TileB& sB,
                                                       int depth) {
  constexpr int kDepth = kDepthOfStep<typename TileA::value_type>;
  constexpr int kRows = decltype(cute::size<0>(sA))::value, kColumns = decltype(cute::size<0>(sB))::value;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<1>(sA) / kDepth; ++k) {
    if (k * kDepth >= depth) break;
    multiply_whole_tile(
        mma, acc, cute::local_tile(sA, cute::Shape<cute::Int<kRows>, cute::Int<kDepth>>{}, cute::make_coord(0, k)),
        cute::local_tile(sB, cute::Shape<cute::Int<kColumns>, cute::Int<kDepth>>{}, cute::make_coord(0, k)));
  }
}

// acc += a b^T, a in registers (operand A).
template <class Mma, class Acc, class OperandA, class TileB>
__device__ __forceinline__ void multiply_held_tile(const Mma& mma, Acc& acc, const OperandA& rA, const TileB& sB) {
  multiply_steps<StepOrder::kByRows>(mma, typename Mma::CopyB{}, acc, acc, [](int, int) {}, rA, sB);
}

// acc += a b, a in registers (operand A), `sB` (depth,columns).
template <StepOrder kOrder, class Mma, class Acc, class OperandA, class TileB>
__device__ __forceinline__ void multiply_whole_operand(const Mma& mma, Acc& acc, const OperandA& rA, const TileB& sB) {
  multiply_steps<kOrder>(mma, typename Mma::CopyTransposedB{}, acc, acc, [](int, int) {}, rA, transposed(sB));
}

// acc += a b^T of one warp, `sA` (rows,depth) and `sB` (columns,depth) in shared memory, their depth not contiguous.
// The first `depth` exist; behind them, one operand is zero and the other one finite. Two accumulators in turn, since
// neighbouring instructions of few columns would wait for each other.
template <class Mma, class Acc, class TileA, class TileB>
__device__ __forceinline__ void multiply_transposed(const Mma& mma, int lane, Acc& acc, const TileA& sA,
                                                    const TileB& sB, int depth) {
  using Element = typename TileA::value_type;
  constexpr int kStepsOfGroup = 2;
  const typename Mma::CopyTransposedA atom_a;
  const typename Mma::CopyTransposedB atom_b;
  const auto copy_a = cute::make_tiled_copy_A(atom_a, mma).get_slice(lane);
  const auto copy_b = cute::make_tiled_copy_B(atom_b, mma).get_slice(lane);
  cute::Tensor rA =
      cute::make_fragment_like<Element>(mma.get_slice(lane).partition_fragment_A(sA));  // (MMA,MMA_M,MMA_K)
  cute::Tensor rB =
      cute::make_fragment_like<Element>(mma.get_slice(lane).partition_fragment_B(sB));  // (MMA,MMA_N,MMA_K)
  cute::Tensor tAsA = copy_a.partition_S(sA);                                           // (CPY,CPY_M,CPY_K)
  cute::Tensor tBsB = copy_b.partition_S(sB);                                           // (CPY,CPY_N,CPY_K)
  cute::Tensor tArA = copy_a.retile_D(rA);                                              // (CPY,CPY_M,CPY_K)
  cute::Tensor tBrB = copy_b.retile_D(rB);                                              // (CPY,CPY_N,CPY_K)
  cute::Tensor other = cute::make_fragment_like(acc);
  clear(other);
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(rA); k += kStepsOfGroup) {
    if (k * kDepthOfStep<Element> >= depth) break;
    CUTE_UNROLL
    for (int i = k; i < k + kStepsOfGroup; ++i) {
      cute::copy(atom_a, tAsA(cute::_, cute::_, i), tArA(cute::_, cute::_, i));
      cute::copy(atom_b, tBsB(cute::_, cute::_, i), tBrB(cute::_, cute::_, i));
    }
    CUTE_UNROLL
    for (int i = k; i < k + kStepsOfGroup; ++i) {
      cute::gemm(mma, rA(cute::_, cute::_, i), rB(cute::_, cute::_, i), i % 2 == 0 ? acc : other);
    }
  }
  CUTE_UNROLL
  for (int i = 0; i < cute::size(acc); ++i) acc(i) += other(i);
}

}  // namespace vitkernels::cuda
