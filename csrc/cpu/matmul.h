// Small matrix products on packed operands: C (+)= A B.
#pragma once

#include "cpu/matmul_operands.h"
#include "cpu/matmul_registers.h"
#include "cpu/matmul_tiles.h"

namespace vitkernels::VK_ISA {

// Rows of A that one pass over B serves: callers that choose how many rows they take choose these.
template <class E>
inline constexpr int kRowGroup = kByTiles<E> ? 2 * kTileSize : kTileRows;

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; `columns` is a multiple of the vector width, `depth` padded.
template <class E, bool kAccumulate>
void matmul(MatmulA<E> a, MatmulB<E> b, int64_t rows, int64_t columns, int64_t depth, Sum<E>* c, int64_t c_stride) {
  if constexpr (kByTiles<E>) {
    matmul_tiles(a, b, rows, columns, depth, c, c_stride, kAccumulate);
  } else {
    matmul_registers<E, kAccumulate>(a, b, rows, columns, depth, c, c_stride);
  }
}

// The product of two rows; `depth` is a multiple of the operand vector's elements.
template <class E>
VK_INLINE Vec<Sum<E>> dot_in_all_lanes(const E* a, const E* b, int64_t depth) {
  using Operand = Arithmetic<E>;
  Vec<Sum<E>> sum{};
  for (int64_t k = 0; k < depth; k += kOperandWidth<E>) {
    sum = Operand::multiply_add(sum, Operand::load(a + k), Operand::load(b + k));
  }
  return add_lanes<Sum<E>>(sum);
}

}  // namespace vitkernels::VK_ISA
