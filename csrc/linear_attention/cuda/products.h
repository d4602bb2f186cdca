// Products of tiles in shared memory by one warp, of 16-bit elements or float, stored by rows or by columns.
#pragma once

#include "cuda/shared_fragments.h"

namespace vitkernels::cuda {

// Where the depth of an operand runs: along the rows of its tile, or from row to row.
enum class Depth { kAlongRows, kAcrossRows };

// A swizzled tile of 16-bit elements: blocks of at most 64 columns, one behind the other.
template <class Element, int kRows, int kColumns>
struct ColumnBlocks {
  static constexpr int kOfBlock = kColumns < 64 ? kColumns : 64;
  using Block = SharedTile<Element, kRows, kOfBlock>;
  static constexpr unsigned kBlockBytes = Block::kElements * 2;
};

// The sixteen rows (operand A) or columns (operand B) from `first` on, and those behind, of an operand in a tile. A
// step of the depth is that of an instruction.
template <class Element, int kRows, int kColumns, Depth kDepth, bool kIsA>
class StoredOperand {
  using Blocks = ColumnBlocks<Element, kRows, kColumns>;
  static constexpr auto kOrder = kIsA == (kDepth == Depth::kAlongRows) ? MatrixOrder::kByRows : MatrixOrder::kByColumns;

 public:
  static constexpr int kStep = 16;

  __device__ StoredOperand(const Element* tile, int first)
      : tile_(cute::cast_smem_ptr_to_uint(tile)),
        address_(kDepth == Depth::kAlongRows ? first : 0, kDepth == Depth::kAlongRows ? 0 : first % Blocks::kOfBlock),
        block_(kDepth == Depth::kAlongRows ? 0 : first / Blocks::kOfBlock) {}

  __device__ void read(uint32_t (&to)[4], int index, int step) const {
    const int down = kDepth == Depth::kAlongRows ? index : step, right = kDepth == Depth::kAlongRows ? step : index;
    constexpr int kInBlock = Blocks::kOfBlock / 16;
    const unsigned address =
        address_(tile_ + (block_ + right / kInBlock) * Blocks::kBlockBytes, down, right % kInBlock);
    if constexpr (kDepth == Depth::kAcrossRows) {
      load_transposed_matrices(to, address);
    } else {
      load_matrices(to, address);
    }
  }

 private:
  unsigned tile_;
  FragmentAddress<typename Blocks::Block, kOrder> address_;
  int block_;
};

// The same of float, element by element.
template <int kRows, int kColumns, Depth kDepth, bool kIsA>
class StoredOperand<float, kRows, kColumns, kDepth, kIsA> {
  using Tile = SharedTile<float, kRows, kColumns>;

 public:
  static constexpr int kStep = 8;

  __device__ StoredOperand(const float* tile, int first) : tile_(tile), first_(first) {}

  // A: rows g and g + 8 at depth t, then at t + 4. B: depth t and t + 4 of column g, then of column g + 8.
  __device__ void read(uint32_t (&to)[4], int index, int step) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int inner = first_ + index * 16 + g + (kIsA ? i % 2 : i / 2) * 8;
      const int depth = step * kStep + t + (kIsA ? i / 2 : i % 2) * 4;
      const int row = kDepth == Depth::kAlongRows ? inner : depth, column = kDepth == Depth::kAlongRows ? depth : inner;
      to[i] = __float_as_uint(tile_[typename Tile::Layout{}(row, column)]);
    }
  }

 private:
  const float* tile_;
  int first_;
};

// Of 16 kRows x 8 kColumns elements.
template <int kRows, int kColumns>
using Accumulators = decltype(cute::make_tensor<float>(
    cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kRows>, cute::Int<kColumns>>{}));  // (MMA,MMA_M,MMA_N)

// Operand A of some sixteens of rows in registers: what it is multiplied with may change.
template <class Element, int kRows, int kDepth>
struct HeldOperand {
  static constexpr int kSteps = kDepth * int(sizeof(Element)) / 32;

  uint32_t steps[kRows][kSteps][4];

  template <class Stored>
  __device__ explicit HeldOperand(const Stored& a) {
    CUTE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      CUTE_UNROLL
      for (int k = 0; k < kSteps; ++k) a.read(steps[m][k], m, k);
    }
  }
  __device__ void read(uint32_t (&to)[4], int index, int step) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = steps[index][step][i];
  }
};

// Operand B of one column in two: `at(depth)` rounded, and what the rounding lost, also rounded. Steps are made where
// they are read.
template <class Element, int kDepth, class At>
struct ColumnOperand {
  static constexpr int kSteps = kDepth * int(sizeof(Element)) / 32;

  At at;

  struct Step {
    uint32_t words[2];
  };
  __device__ Step step(int k) const {
    const int column = lane_index() / 4, t = lane_index() % 4;
    const auto part = [&](int depth) {
      const float x = at(depth), rounded = round(x);
      return column == 0 ? rounded : column == 1 ? round(x - rounded) : 0.0f;
    };
    Step step;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (sizeof(Element) == 4) {
        step.words[i] = __float_as_uint(part(8 * k + t + 4 * i));
      } else {
        const Element pair[2] = {Element(part(16 * k + 2 * t + 8 * i)), Element(part(16 * k + 2 * t + 8 * i + 1))};
        step.words[i] = *reinterpret_cast<const uint32_t*>(pair);
      }
    }
    return step;
  }

 private:
  static __device__ float round(float x) {
    if constexpr (sizeof(Element) == 4) {
      return round_to_tf32(x);
    } else {
      return float(Element(x));
    }
  }
};

// The steps of such an operand in registers.
template <class Element, int kDepth>
struct HeldColumn {
  static constexpr int kSteps = kDepth * int(sizeof(Element)) / 32;

  struct Step {
    uint32_t words[2];
  } steps[kSteps];

  template <class At>
  __device__ explicit HeldColumn(const ColumnOperand<Element, kDepth, At>& column) {
    CUTE_UNROLL
    for (int k = 0; k < kSteps; ++k) steps[k] = {column.step(k).words[0], column.step(k).words[1]};
  }
  __device__ Step step(int k) const { return steps[k]; }
};

struct One {
  __device__ float operator()(int) const { return 1.0f; }
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

// acc += a b over `kDepth` rows or columns of their tiles. Operand A may have several sixteens of rows.
template <class Element, int kDepth, class Acc, class A, class B>
__device__ __forceinline__ void add_products(Acc& acc, const A& a, const B& b, bool allow_tf32) {
  constexpr int kRows = decltype(cute::size<1>(acc))::value, kPairs = decltype(cute::size<2>(acc))::value / 2;
  const cute::MMA_Atom<typename TensorCore<Element>::Atom> mma;
  constexpr int kSteps = kDepth * int(sizeof(Element)) / 32;
  constexpr int kUnrolled =
      sizeof(Element) == 2 ? kSteps : 1;  // of float, loads of later steps would fill the registers
  with_arithmetic<Element>(allow_tf32, [&](auto arithmetic) __attribute__((always_inline)) {
#pragma unroll kUnrolled
    for (int k = 0; k < kSteps; ++k) {
      uint32_t rows[kRows][4];
      CUTE_UNROLL
      for (int m = 0; m < kRows; ++m) a.read(rows[m], m, k);
      CUTE_UNROLL
      for (int n = 0; n < kPairs; ++n) {
        uint32_t columns[4];
        b.read(columns, n, k);
        CUTE_UNROLL
        for (int m = 0; m < kRows; ++m) {
          const auto rA = arithmetic.prepare(fragment_of<Element>(rows[m]));  // (MMA)
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const uint32_t column[2] = {columns[2 * i], columns[2 * i + 1]};
            auto&& sum = acc(cute::_, m, 2 * n + i);  // (MMA)
            arithmetic.multiply_add(mma, rA, arithmetic.prepare(fragment_of<Element>(column)), sum);
          }
        }
      }
    }
  });
}

// The products of rows with a column: acc (MMA,MMA_M,1), in whose first two columns they are, in two parts.
template <class Element, class Acc, class A, class Column>
__device__ __forceinline__ void add_column(Acc& acc, const A& a, const Column& b, bool allow_tf32) {
  constexpr int kUnrolled = sizeof(Element) == 2 ? Column::kSteps : 1;  // as above
  const cute::MMA_Atom<typename TensorCore<Element>::Atom> mma;
  with_arithmetic<Element>(allow_tf32, [&](auto arithmetic) __attribute__((always_inline)) {
#pragma unroll kUnrolled
    for (int k = 0; k < Column::kSteps; ++k) {
      const auto rB = arithmetic.prepare(fragment_of<Element>(b.step(k).words));  // (MMA)
      CUTE_UNROLL
      for (int m = 0; m < cute::size<1>(acc); ++m) {
        uint32_t rows[4];
        a.read(rows, m, k);
        auto&& sum = acc(cute::_, m, 0);  // (MMA)
        arithmetic.multiply_add(mma, arithmetic.prepare(fragment_of<Element>(rows)), rB, sum);
      }
    }
  });
}

}  // namespace vitkernels::cuda
