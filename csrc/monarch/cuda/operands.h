// Operands of the Monarch products in shared memory: tiles whose rows have 64 bytes, copied some steps ahead.
#pragma once

#include "cuda/shared_fragments.h"
#include "monarch/cuda/launches.h"

namespace vitkernels::cuda {

template <DType kDType>
using MonarchElement =
    std::conditional_t<kDType == DType::kFloat32, float,
                       std::conditional_t<kDType == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>>;

template <class Element>
inline constexpr int kVectorOf = 16 / int(sizeof(Element));

// Copies a vector, of which `count` elements exist; the others become zero. If rows are aligned, all or none exist.
template <class Element>
__device__ __forceinline__ void copy_vector(Element* to, const Element* from, int count, bool is_aligned) {
  if (is_aligned) {
    copy_16_bytes(to, from, count > 0 ? 16 : 0);
  } else {
    CUTE_UNROLL
    for (int i = 0; i < kVectorOf<Element>; ++i) to[i] = i < count ? from[i] : Element(0);
  }
}

// Rows of a tile as operand A or B of an instruction, sixteen at a time; `step` counts instructions along the depth.
template <class Element, bool kIsA>
class RowOperand {
  using Tile = SharedTile<Element, 64, 64 / int(sizeof(Element))>;
  static constexpr auto kOrder = kIsA ? MatrixOrder::kByRows : MatrixOrder::kByColumns;

 public:
  __device__ explicit RowOperand(int first_row) : address_(first_row) {}

  __device__ void read(uint32_t (&to)[4], const Element* tile, int sixteen, int step) const {
    load_matrices(to, address_(cute::cast_smem_ptr_to_uint(tile), sixteen, step));
  }

 private:
  FragmentAddress<Tile, kOrder> address_;
};

template <bool kIsA>
class RowOperand<float, kIsA> {
  using Tile = SharedTile<float, 64, 16>;

 public:
  __device__ explicit RowOperand(int first_row) : row_(first_row + lane_index() / 4) {}

  // A: rows g and g + 8 at depth t, then at t + 4. B: depth t and t + 4 of row g, then of row g + 8.
  __device__ void read(uint32_t (&to)[4], const float* tile, int sixteen, int step) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = row_ + sixteen * 16 + (kIsA ? i % 2 : i / 2) * 8;
      const int depth = step * 8 + lane_index() % 4 + (kIsA ? i / 2 : i % 2) * 4;
      to[i] = __float_as_uint(tile[typename Tile::Layout{}(row, depth)]);
    }
  }

 private:
  int row_;
};

template <class Element, int kRegisters>
__device__ auto fragment_of(const uint32_t (&registers)[kRegisters]) {
  cute::Tensor fragment =
      cute::make_tensor<Element>(cute::Shape<cute::Int<kRegisters * 4 / int(sizeof(Element))>>{});  // (MMA)
  const cute::Tensor words = cute::recast<uint32_t>(fragment);
  CUTE_UNROLL
  for (int i = 0; i < kRegisters; ++i) words(i) = registers[i];
  return fragment;
}

// Of 16 kRows x 8 kColumns elements.
template <int kRows, int kColumns>
using MonarchAcc = decltype(cute::make_tensor<float>(
    cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kRows>, cute::Int<kColumns>>{}));  // (MMA,MMA_M,MMA_N)

// Two sixteens of rows, as the arithmetic has them: prepared once for all columns.
template <class Element, class Arithmetic>
struct PreparedRows {
  using Fragment = decltype(fragment_of<Element>(std::declval<const uint32_t (&)[4]>()));
  using Prepared = decltype(Arithmetic::prepare(std::declval<const Fragment&>()));

  Prepared upper, lower;

  __device__ explicit PreparedRows(const uint32_t (&rows)[2][4])
      : upper(Arithmetic::prepare(fragment_of<Element>(rows[0]))),
        lower(Arithmetic::prepare(fragment_of<Element>(rows[1]))) {}
};

// Columns 16 pair .. 16 pair + 15 of the sums += a b, one instruction deep.
template <class Element, class Arithmetic, class Acc>
__device__ __forceinline__ void multiply_pair(Arithmetic arithmetic, Acc& acc,
                                              const PreparedRows<Element, Arithmetic>& rows,
                                              const uint32_t (&columns)[4], int pair) {
  const cute::MMA_Atom<typename TensorCore<Element>::Atom> mma;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t column[2] = {columns[2 * i], columns[2 * i + 1]};
    const auto b = arithmetic.prepare(fragment_of<Element>(column));  // (MMA)
    auto&& upper = acc(cute::_, 0, 2 * pair + i);                     // (MMA)
    auto&& lower = acc(cute::_, 1, 2 * pair + i);                     // (MMA)
    arithmetic.multiply_add(mma, rows.upper, b, upper);
    arithmetic.multiply_add(mma, rows.lower, b, lower);
  }
}

}  // namespace vitkernels::cuda
