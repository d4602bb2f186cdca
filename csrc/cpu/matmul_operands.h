// Layout and padding of the operands of a matrix product C (+)= A B.
//
// Groups of kGroup elements along the depth lie together (arithmetic.h). A is read through two strides, from row to row
// and from group to group. B comes in panels: columns [p * kPanel, (p + 1) * kPanel) of B lie at b + p * panel_stride,
// a row of groups `row_stride` after the other.
#pragma once

#include "cpu/arithmetic.h"

namespace vitkernels::VK_ISA {

VK_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
VK_INLINE constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Vectors of columns that a tile of C has.
inline constexpr int kTileVectors = 2;

template <class E>
inline constexpr int kPanel = kTileVectors * kWidth<Sum<E>>;  // columns

// Rounding errors grow with the length of a chain of multiply-adds; longer depths are cut.
inline constexpr int64_t kChain = 256;

#if defined(__AMX_BF16__)
inline constexpr bool kHasTiles = true;
#else
inline constexpr bool kHasTiles = false;
#endif

// Products by tile registers (matmul_tiles.h) take whole tiles of the depth: operands are padded with zeros. Rows of A up
// to the next whole tile are read and may hold anything.
inline constexpr int kTileSize = 16;

template <class E>
inline constexpr bool kByTiles = kHasTiles && kGroup<E> == 2;

template <class E>
VK_INLINE constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, kByTiles<E> ? kTileSize * kGroup<E> : kGroup<E>);
}

template <class E>
struct MatmulA {
  const E* data;
  int64_t row_stride, depth_stride;
};

template <class E>
struct MatmulB {
  const E* data;
  int64_t row_stride, panel_stride;
};

}  // namespace vitkernels::VK_ISA
