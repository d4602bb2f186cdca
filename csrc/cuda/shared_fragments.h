// Fragments of 16-bit operands in shared memory, at addresses that a thread computes once for all tiles of a size.
//
// Swizzled tiles repeat every sixteen rows: fragments of other rows lie at fixed distances, which are part of the
// instruction. CuTe's copies compute each address anew, in several instructions.
#pragma once

#include "cuda/copy.h"
#include "cuda/mma.h"

namespace vitkernels::cuda {

// Bytes from a tile's beginning to an element.
template <class Tile>
__device__ unsigned bytes_to(int row, int column) {
  return unsigned(typename Tile::Layout{}(row, column)) * 2;
}
template <class Tile>
inline constexpr int kRowBytes = 2 * decltype(cute::size<1>(typename Tile::Layout{}))::value;

// How the lanes of a warp name the rows of the four matrices of an ldmatrix, in sixteen rows and columns of a tile.
enum class MatrixOrder {
  kByRows,     // A (rows,depth); B stored as (depth,columns), transposed on the way
  kByColumns,  // B (columns,depth); A stored as (depth,rows), transposed on the way
};

// Of a lane, in the sixteen rows and columns from an element on.
template <class Tile, MatrixOrder kOrder>
class FragmentAddress {
 public:
  __device__ explicit FragmentAddress(int row = 0, int column = 0) {
    const int lane = lane_index(), matrix = lane / 8;
    const int down = kOrder == MatrixOrder::kByRows ? matrix % 2 : matrix / 2;
    const int right = kOrder == MatrixOrder::kByRows ? matrix / 2 : matrix % 2;
    first_ = bytes_to<Tile>(row + down * 8 + lane % 8, column + right * 8);
  }

  // In the tile at `tile`, `rows` and `columns` times sixteen further. Swizzled, columns differ in some bits.
  __device__ unsigned operator()(unsigned tile, int rows, int columns) const {
    return ((tile + first_) ^ unsigned(columns * 32)) + unsigned(rows * 16 * kRowBytes<Tile>);
  }

 private:
  unsigned first_;
};

__device__ inline void load_matrices(uint32_t (&to)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed_matrices(uint32_t (&to)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Rounded accumulators (MMA,MMA_M,MMA_N) of sixteen rows as operand A, a step of sixteen columns each.
template <class Fragment>
__device__ void operand_a_of(uint32_t (&a)[4], const Fragment& rounded, int step) {
  const cute::Tensor pairs = cute::recast<const uint32_t>(rounded);
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = pairs(i % 2, 0, 2 * step + i / 2);
}

// acc(.., n) = first(.., n) + a b.
template <class Element, class Acc, class First>
__device__ void multiply_add(Acc& acc, const First& first, int n, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  TensorCore<Element>::Atom::fma(acc(0, 0, n), acc(1, 0, n), acc(2, 0, n), acc(3, 0, n), a[0], a[1], a[2], a[3], b0, b1,
                                 first(0, 0, n), first(1, 0, n), first(2, 0, n), first(3, 0, n));
}

// acc = first + a b of one warp. `read_a(a, k)` and `read_b(b, j, k)` read operand A and sixteen columns of operand B
// for a step of the depth: those of the next step while this one is multiplied.
template <class Element, int kSteps, class Acc, class First, class ReadA, class ReadB>
__device__ __forceinline__ void multiply_fragments(Acc& acc, const First& first, ReadA&& read_a, ReadB&& read_b) {
  constexpr int kPairs = decltype(cute::size<2>(acc))::value / 2;
  uint32_t a[2][4], b[2][kPairs][4];
  const auto read = [&](int k) {
    read_a(a[k % 2], k);
    CUTE_UNROLL
    for (int j = 0; j < kPairs; ++j) read_b(b[k % 2][j], j, k);
  };
  read(0);
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if (k + 1 < kSteps) read(k + 1);
    CUTE_UNROLL
    for (int n = 0; n < 2 * kPairs; ++n) {
      const uint32_t(&pair)[4] = b[k % 2][n / 2];
      if (k == 0) {
        multiply_add<Element>(acc, first, n, a[0], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
      } else {
        multiply_add<Element>(acc, acc, n, a[k % 2], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
      }
    }
  }
}

}  // namespace vitkernels::cuda
