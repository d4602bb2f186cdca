// Packs tensor rows into the layouts of the matrix products.
#pragma once

#include "cpu/convert.h"
#include "cpu/matmul.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"

namespace vitkernels::VK_ISA {

// target [rows, round_up(columns)] = factor * source [rows, columns]; the padding columns become zero.
template <class T, class Rows>
void pack_rows(Rows source, int64_t rows, int64_t columns, T factor, T* target, int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = source[r];
    T* to = target + r * target_stride;
    for_each_part<kWidth<T>>(
        columns, [&](int64_t c, int64_t count) VK_BODY { store(to + c, load_widened<T>(from + c, count) * factor); });
  }
}

// The way back: target [rows, columns] = factor * source [rows, columns], without the padding.
template <class T, class S>
void unpack_rows(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, S* target,
                 int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = source + r * source_stride;
    S* to = target + r * target_stride;
    for_each_part<kWidth<T>>(
        columns, [&](int64_t c, int64_t count) VK_BODY { store_narrowed<T>(to + c, load(from + c) * factor, count); });
  }
}

// A vector of operands as they lie in memory: `count` elements, zero behind them.
template <class E, class S>
VK_INLINE Vec<Sum<E>> load_operands(const S* p, int64_t count) {
  if constexpr (std::is_same_v<E, Sum<E>>) {
    return load_widened<E>(p, count);
  } else {
    static_assert(std::is_same_v<E, S>);
    return load_pairs(p, count);
  }
}

// target [rows, target_stride] = source [rows, columns], zero up to the next full vector.
template <class E, class Rows>
void pack_operands(Rows source, int64_t rows, int64_t columns, E* target, int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = source[r];
    E* to = target + r * target_stride;
    for_each_part<kOperandWidth<E>>(columns, [&](int64_t c, int64_t count) VK_BODY {
      store(reinterpret_cast<Sum<E>*>(to + c), load_operands<E>(from + c, count));
    });
  }
}

// target [padded rows / kGroup, width, kGroup] = source [rows, columns]: rows as the depth of a product. The padding of
// rows is zero, and so are columns up to the next full vector.
template <class E, class Rows>
void pack_groups(Rows source, int64_t rows, int64_t columns, E* target, int64_t width) {
  if constexpr (kGroup<E> == 1) {
    pack_operands(source, rows, columns, target, width);
  } else {
    pack_pairs(source, rows, columns, target, width);
  }
}

// One square of pack_transposed, from column `first` on. Missing rows repeat the last one: their results are not read.
template <bool kFullColumns, class E, class Rows>
VK_INLINE void pack_transposed_square(Rows source, int64_t rows, int64_t first, int64_t columns, E* panel) {
  using T = Sum<E>;
  constexpr int kN = kWidth<T>;
  Vec<T> square[kN];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kN; ++i) {
    square[i] = load_operands<E>(source[std::min(i, rows - 1)] + first, kFullColumns ? kOperandWidth<E> : columns);
  }
  transpose<T>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) {
    if (kFullColumns || i * kGroup<E> < padded_depth<E>(columns))
      store(reinterpret_cast<T*>(panel) + i * kPanel<E>, square[i]);
  }
}

// target = source^T in panels of kPanel source rows: [rows / kPanel, padded columns / kGroup, kPanel, kGroup]. The
// padding of columns is zero; the padding up to the next full vector of rows repeats the last row.
template <class E, class Rows>
void pack_transposed(Rows source, int64_t rows, int64_t columns, E* target) {
  constexpr int64_t kN = kWidth<Sum<E>>;
  const int64_t depth = padded_depth<E>(columns);
  for (int64_t r = 0; r < rows; r += kN) {
    E* panel = target + r / kPanel<E> * depth * kPanel<E> + r % kPanel<E> * kGroup<E>;
    for (int64_t c = 0; c < columns; c += kOperandWidth<E>) {
      const int64_t valid_rows = std::min(rows - r, kN), valid_columns = columns - c;
      if (valid_columns >= kOperandWidth<E>) {
        pack_transposed_square<true>(source.from(r), valid_rows, c, valid_columns, panel + c * kPanel<E>);
      } else {
        pack_transposed_square<false>(source.from(r), valid_rows, c, valid_columns, panel + c * kPanel<E>);
      }
    }
  }
}

}  // namespace vitkernels::VK_ISA
