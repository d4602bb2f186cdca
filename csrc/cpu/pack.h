// Copies of tensor rows into the layouts that the matrix products want.
#pragma once

#include "cpu/convert.h"
#include "cpu/matmul.h"

namespace vitkernels::VK_ISA {

// target [rows, round_up(columns)] = factor * source [rows, columns]; the padding columns become zero.
template <class T, class S>
void pack_rows(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, T* target,
               int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r, source += source_stride, target += target_stride) {
    for (int64_t c = 0; c < columns; c += kWidth<T>) {
      const int64_t count = std::min<int64_t>(columns - c, kWidth<T>);
      store(target + c, load_widened<T>(source + c, count) * factor);
    }
  }
}

// source [rows, columns] = factor * target [rows, columns], the way back.
template <class T, class S>
void unpack_rows(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T factor, S* target,
                 int64_t target_stride) {
  for (int64_t r = 0; r < rows; ++r, source += source_stride, target += target_stride) {
    for (int64_t c = 0; c < columns; c += kWidth<T>) {
      const int64_t count = std::min<int64_t>(columns - c, kWidth<T>);
      store_narrowed<T>(target + c, load(source + c) * factor, count);
    }
  }
}

// target = source^T in panels of kPanel source rows: [rows / kPanel, columns, kPanel]. Padding rows become zero.
// A panel takes columns * kPanel elements.
template <class T, class S>
void pack_transposed(const S* source, int64_t source_stride, int64_t rows, int64_t columns, T* target) {
  constexpr int kN = kWidth<T>;
  for (int64_t r = 0; r < rows; r += kN) {
    T* panel = target + r / kPanel<T> * columns * kPanel<T> + r % kPanel<T>;
    const int64_t valid_rows = std::min<int64_t>(rows - r, kN);
    for (int64_t c = 0; c < columns; c += kN) {
      const int64_t valid_columns = std::min<int64_t>(columns - c, kN);
      Vec<T> square[kN];
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        square[i] = i < valid_rows ? load_widened<T>(source + (r + i) * source_stride + c, valid_columns) : Vec<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        if (i < valid_columns) store(panel + (c + i) * kPanel<T>, square[i]);
      }
    }
  }
}

}  // namespace vitkernels::VK_ISA
