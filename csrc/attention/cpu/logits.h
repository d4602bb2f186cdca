// Logits of a KV tile on the CPU: the first product of forward and backward, with the same bits in both.
#pragma once

#include "attention/pattern.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {

// Patches and a class token are often one key more than full vectors. So few keys take dot products instead of a vector
// that is nearly empty.
inline constexpr int64_t kMaxLastKeys = 2;

// Folding the scale into the queries is free, but bfloat16 operands must keep the tensors' bits.
template <class E>
inline constexpr bool kFoldsScale = std::is_same_v<E, Sum<E>>;

// Rows of queries as operands: [rows, row_stride].
template <class E, class Rows>
void pack_queries(Rows queries, int64_t rows, int64_t head_dim, Sum<E> scale, E* target, int64_t row_stride) {
  if constexpr (kFoldsScale<E>) {
    pack_rows<E>(queries, rows, head_dim, scale, target, row_stride);
  } else {
    pack_operands(queries, rows, head_dim, target, row_stride);
  }
}

// A packed tile of keys.
template <class E>
struct KeyTile {
  using T = Sum<E>;

  E* panels;     // [keys / kPanel, d / kGroup, kPanel, kGroup]
  E* last_rows;  // [kMaxLastKeys, row_stride]
  int64_t head_dim, row_stride;
  int64_t count = 0, num_last = 0;

  template <class Rows>
  void pack(Rows keys, int64_t num_keys) {
    count = num_keys;
    num_last = count % kWidth<T> <= kMaxLastKeys ? count % kWidth<T> : 0;
    pack_transposed(keys, count - num_last, head_dim, panels);
    if (num_last == 0) return;
    pack_operands(keys.from(count - num_last), num_last, head_dim, last_rows, row_stride);
  }

  // logits [rows, seen] = queries [rows, d] keys^T for the keys `seen`, which begin at a panel. Columns up to the next full
  // vector are scratch.
  void multiply(const E* queries, int64_t rows, Range seen, T* logits, int64_t logits_stride) const {
    const int64_t seen_keys = seen.end - seen.begin, depth = padded_depth<E>(head_dim);
    const int64_t first_last = count - num_last;
    const int64_t width =
        num_last > 0 && seen.end > first_last ? first_last - seen.begin : round_up(seen_keys, kWidth<T>);
    matmul<E, false>({queries, row_stride, kGroup<E>},
                     {panels + seen.begin * depth, kPanel<E> * kGroup<E>, depth * kPanel<E>}, rows, width, depth,
                     logits, logits_stride);
    if (width >= seen_keys) return;
    // Stored as whole vectors: a vector load soon after narrower stores would miss store forwarding.
    for (int64_t r = 0; r < rows; ++r) {
      const E* query = queries + r * row_stride;
      Vec<T> last = dot_in_all_lanes(query, last_rows, row_stride);
      if (num_last > 1) last = keep_first(last, 1, dot_in_all_lanes(query, last_rows + row_stride, row_stride)[0]);
      store(logits + r * logits_stride + width, last);
    }
  }
};

}  // namespace vitkernels::VK_ISA
