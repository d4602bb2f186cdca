// Matrix products by vector registers.
//
// A tile of C stays in registers over kChain steps of the depth. An element of C is the sum of such chains of
// multiply-adds, in the order of the depth, whatever the tile: how rows are split between tiles or threads never changes a
// bit.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/matmul_operands.h"

namespace vitkernels::VK_ISA {

// Registers: kTileRows * kTileVectors accumulators, kTileVectors of B, one broadcast of A.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 14;  // of 32 registers
#elif defined(__aarch64__)
inline constexpr int kTileRows = 12;  // of 32
#else
inline constexpr int kTileRows = 6;  // of 16
#endif

// A comes as its members: the compiler would build a struct on the stack and copy it with wider loads than its stores,
// which wait until all stores before them, those of C included, have left the store buffer.
template <class E>
using TileFunction = void (*)(const E* a, const E* b, int64_t groups, Sum<E>* c, int64_t a_row_stride,
                              int64_t a_depth_stride, int64_t b_stride, int64_t c_stride);

template <class E, int kRows, int kVectors, bool kAccumulate>
void matmul_tile(const E* a, const E* b, int64_t groups, Sum<E>* c, int64_t a_row_stride, int64_t a_depth_stride,
                 int64_t b_stride, int64_t c_stride) {
  using T = Sum<E>;
  using Operand = Arithmetic<E>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  }
  for (int64_t k = 0; k < groups; ++k, a += a_depth_stride, b += b_stride) {
    typename Operand::Vector b_row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b_row[v] = Operand::load(b + v * kWidth<T> * kGroup<E>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto a_value = Operand::broadcast(a + r * a_row_stride);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Operand::multiply_add(sum[r][v], a_value, b_row[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* target = c + r * c_stride + v * kWidth<T>;
      store(target, kAccumulate ? load(target) + sum[r][v] : sum[r][v]);
    }
  }
}

template <class E, int kVectors, bool kAccumulate>
inline constexpr auto kTileFunctions = []<std::size_t... kRow>(std::index_sequence<kRow...>) {
  return std::array<TileFunction<E>, sizeof...(kRow)>{&matmul_tile<E, int(kRow) + 1, kVectors, kAccumulate>...};
}(std::make_index_sequence<kTileRows>());

template <class E, bool kAccumulate>
void matmul_registers(MatmulA<E> a, MatmulB<E> b, int64_t rows, int64_t columns, int64_t depth, Sum<E>* c,
                      int64_t c_stride) {
  constexpr int64_t kWidthOfC = kWidth<Sum<E>>, kChainGroups = kChain / kGroup<E>;
  const int64_t blocks = divide_up(rows, kTileRows), groups = depth / kGroup<E>;
  for (int64_t block = 0; block < blocks; ++block) {
    // Balanced blocks: 15 rows are 8 + 7, not 14 + 1.
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    for (int64_t column = 0; column < columns; column += kPanel<E>) {
      const bool wide = columns - column > kWidthOfC;
      const auto& set = wide ? kTileFunctions<E, 2, kAccumulate> : kTileFunctions<E, 1, kAccumulate>;
      const auto& add = wide ? kTileFunctions<E, 2, true> : kTileFunctions<E, 1, true>;
      for (int64_t k = 0; k < groups; k += kChainGroups) {
        const E* a_block = a.data + first * a.row_stride + k * a.depth_stride;
        const E* panel = b.data + column / kPanel<E> * b.panel_stride + k * b.row_stride;
        const auto tile = k == 0 ? set[count - 1] : add[count - 1];
        tile(a_block, panel, std::min(groups - k, kChainGroups), c + first * c_stride + column, a.row_stride,
             a.depth_stride, b.row_stride, c_stride);
      }
    }
  }
}

}  // namespace vitkernels::VK_ISA
