// Logits of a tile of keys on the CPU: the first product of forward and backward, the same bits in both.
#pragma once

#include "attention/pattern.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {

// A grid of patches and a class token are one key more than full vectors. So few keys are multiplied one by one instead
// of as a vector that is nearly empty.
inline constexpr int64_t kMostLastKeys = 2;

// A packed tile of keys.
template <class T>
struct KeyTile {
  T* panels;     // [keys / kPanel, d, kPanel]
  T* last_rows;  // [kMostLastKeys, row_stride]
  int64_t head_dim, row_stride;
  int64_t count = 0, num_last = 0;

  template <class S>
  void pack(const S* keys, int64_t stride, int64_t num_keys) {
    count = num_keys;
    num_last = count % kWidth<T> <= kMostLastKeys ? count % kWidth<T> : 0;
    pack_transposed<T>(keys, stride, count, head_dim, panels);
    if (num_last == 0) return;
    pack_rows<T>(keys + (count - num_last) * stride, stride, num_last, head_dim, T(1), last_rows, row_stride);
  }

  // logits [rows, seen] = queries [rows, d] keys^T. The columns up to the next full vector are scratch.
  void multiply(const T* queries, int64_t rows, int64_t seen, T* logits, int64_t logits_stride) const {
    const int64_t width = seen == count && num_last > 0 ? count - num_last : round_up(seen, kWidth<T>);
    matmul<T, false>({queries, row_stride, 1}, {panels, kPanel<T>, head_dim * kPanel<T>}, rows, width, head_dim, logits,
                     logits_stride);
    for (int64_t key = width; key < seen; ++key) {
      const T* key_row = last_rows + (key - width) * row_stride;
      for (int64_t r = 0; r < rows; ++r) {
        logits[r * logits_stride + key] = dot(queries + r * row_stride, key_row, row_stride);
      }
    }
  }
};

}  // namespace vitkernels::VK_ISA
