// A tile of keys and values, and what groups of queries add to their sums from it. The forward kernels share it.
//
// Queries go through in groups of as many rows as the register tile has: their logits stay in the first-level cache from
// the first product to the second.
#pragma once

#include "attention/logits_cpu.h"
#include "attention/softmax_cpu.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// Rows of a tensor, `stride` elements apart.
template <class S>
struct TensorRows {
  const S* data;
  int64_t stride;

  TensorRows from(int64_t row) const { return {data + row * stride, stride}; }
};

template <class S>
class ForwardTile {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  ForwardTile(int64_t head_dim, int64_t value_dim, int64_t most_keys, Scratch& scratch)
      : head_dim(head_dim),
        value_dim(value_dim),
        query_width(round_up(head_dim, kOperandWidth<E>)),
        value_width(round_up(value_dim, kWidth<T>)),
        // Rows an odd number of vectors apart do not compete for the same cache set.
        logits_stride((most_keys / kWidth<T> | 1) * kWidth<T>),
        queries(scratch.take<E>(kRowGroup<E> * query_width)),
        logits(scratch.take<T>(kRowGroup<E> * logits_stride)),
        key_tile{scratch.take<E>(most_keys * padded_depth<E>(head_dim)), scratch.take<E>(kMostLastKeys * query_width),
                 head_dim, query_width},
        values(scratch.take<E>(most_keys * value_width)) {}

  void pack(TensorRows<S> keys, TensorRows<S> value_rows, int64_t count) {
    key_tile.pack(keys.data, keys.stride, count);
    pack_groups(value_rows.data, value_rows.stride, count, value_dim, values, value_width);
  }

  // What rows of queries have come to. Sums are zero at first, unless this tile is all that they see.
  struct Rows {
    TensorRows<S> queries;
    int64_t count;
    T* sums;              // [count, value_width]
    RowState<T>* states;  // [count]
    bool is_only_tile;
  };

  // Adds the keys that row r sees, the range visible(r) of the tile, within `seen`. apply_terms(logits, r, columns,
  // first_key, scale) does what is done to a row of logits in place and returns their maximum; `has_terms` says whether
  // anything is.
  template <class Visible, class ApplyTerms>
  VK_INLINE void add(const Rows& rows, Range seen, T scale, bool has_terms, Visible&& visible,
                     ApplyTerms&& apply_terms) {
    const int64_t count = rows.count, first = seen.begin / kPanel<E> * kPanel<E>, columns = seen.end - first;
    const T left_scale = kFoldsScale<E> ? T(1) : scale;
    pack_queries(rows.queries.data, rows.queries.stride, count, head_dim, scale, queries, query_width);  // [count, d]
    key_tile.multiply(queries, count, {first, seen.end}, logits, logits_stride);  // [count, columns]

    // Maxima first, exponentials after: the rows of a loop are independent and overlap in the CPU.
    T largest[kRowGroup<E>];
    for (int64_t r = 0; r < count; ++r) {
      T* row = logits + r * logits_stride;
      const Range columns_of_row = relative_to(visible(r), first);
      largest[r] =
          has_terms ? apply_terms(row, r, columns_of_row, first, left_scale) : row_max(row, columns_of_row, left_scale);
    }
    // Their terms applied, logits need no factor any more.
    const T logit_scale = has_terms ? T(1) : left_scale;
    const int64_t depth = padded_depth<E>(columns);
    for (int64_t r = 0; r < count; ++r) {
      T* row = logits + r * logits_stride;
      const T factor = exponentiate(row, reinterpret_cast<E*>(row), relative_to(visible(r), first), depth, logit_scale,
                                    largest[r], rows.states[r]);
      if (!rows.is_only_tile && factor != T(1)) rescale(rows.sums + r * value_width, factor);
    }
    const MatmulA<E> probabilities{reinterpret_cast<const E*>(logits), logits_stride * kGroup<E>, kGroup<E>};
    const MatmulB<E> value_rows{values + first * value_width, value_width * kGroup<E>, kPanel<E> * kGroup<E>};
    if (rows.is_only_tile) {
      matmul<E, false>(probabilities, value_rows, count, value_width, depth, rows.sums, value_width);  // [count, dv]
    } else {
      matmul<E, true>(probabilities, value_rows, count, value_width, depth, rows.sums, value_width);
    }
  }

  // The output of one row, from its sums.
  void finish(const RowState<T>& state, T* sums, S* out) const {
    if (state.sum == T(0)) clear(sums, {0, value_width});  // saw no key: zero, whatever the row holds
    const T factor = state.sum == T(0) ? T(0) : T(1) / state.sum;
    unpack_rows<T>(sums, value_width, 1, value_dim, factor, out, 0);
  }

 private:
  void rescale(T* row, T factor) const {
    for (int64_t c = 0; c < value_width; c += kWidth<T>) store(row + c, load(row + c) * factor);
  }

  const int64_t head_dim, value_dim, query_width;

 public:
  const int64_t value_width;

 private:
  const int64_t logits_stride;
  E* queries;
  T* logits;  // then the exponentials, as operands
  KeyTile<E> key_tile;
  E* values;
};

}  // namespace vitkernels::VK_ISA
