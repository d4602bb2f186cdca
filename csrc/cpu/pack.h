// Copies of tensor rows into the layouts that the matrix products want.
#pragma once

#include "cpu/convert.h"
#include "cpu/matmul.h"

namespace vitkernels::VK_ISA {

// target [rows, round_up(columns)] = factor * source [rows, columns]; the padding columns become zero.
template <class T, class S>
void pack_rows(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, T* target,
               int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const S* from = source + r * source_stride;
    T* to = target + r * target_stride;
    for (int64_t c = 0; c < columns; c += kWidth<T>) {
      const int64_t count = std::min<int64_t>(columns - c, kWidth<T>);
      store(to + c, load_widened<T>(from + c, count) * factor);
    }
  }
}

// The way back: target [rows, columns] = factor * source [rows, columns], without the padding.
template <class T, class S>
void unpack_rows(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, S* target,
                 int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = source + r * source_stride;
    S* to = target + r * target_stride;
    for (int64_t c = 0; c < columns; c += kWidth<T>) {
      const int64_t count = std::min<int64_t>(columns - c, kWidth<T>);
      store_narrowed<T>(to + c, load(from + c) * factor, count);
    }
  }
}

// One square of pack_transposed. Rows that are missing repeat the last one: nobody reads what comes of them.
template <bool kFullColumns, class T, class S>
VK_INLINE void pack_transposed_square(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T* panel) {
  constexpr int kN = kWidth<T>;
  Vec<T> square[kN];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kN; ++i) {
    square[i] = load_widened<T>(source + std::min(i, rows - 1) * source_stride, kFullColumns ? kN : columns);
  }
  transpose<T>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) {
    if (kFullColumns || i < columns) store(panel + i * kPanel<T>, square[i]);
  }
}

// target = source^T in panels of kPanel source rows: [rows / kPanel, columns, kPanel]. A panel takes
// columns * kPanel elements; the padding up to the next full vector of rows repeats the last row.
template <class T, class S>
void pack_transposed(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T* target) {
  constexpr int64_t kN = kWidth<T>;
  for (int64_t r = 0; r < rows; r += kN) {
    T* panel = target + r / kPanel<T> * columns * kPanel<T> + r % kPanel<T>;
    for (int64_t c = 0; c < columns; c += kN) {
      const S* corner = source + r * source_stride + c;
      const int64_t valid_rows = std::min(rows - r, kN), valid_columns = std::min(columns - c, kN);
      if (valid_columns == kN) {
        pack_transposed_square<true>(corner, source_stride, valid_rows, kN, panel + c * kPanel<T>);
      } else {
        pack_transposed_square<false>(corner, source_stride, valid_rows, valid_columns, panel + c * kPanel<T>);
      }
    }
  }
}

}  // namespace vitkernels::VK_ISA
