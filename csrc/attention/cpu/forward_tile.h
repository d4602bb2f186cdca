// A KV tile, and its contribution to the accumulators of groups of queries. The forward kernels share it.
//
// A group has as many rows as the register tile: its logits stay in the L1 cache between the two products.
#pragma once

#include "attention/cpu/logits.h"
#include "attention/cpu/softmax.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// Keys, values and queries are read through `Source` (cpu/rows.h).
template <class S, class Source = EvenRows<S>>
class ForwardTile {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  ForwardTile(int64_t head_dim, int64_t value_dim, int64_t max_keys, Scratch& scratch)
      : head_dim(head_dim),
        value_dim(value_dim),
        query_width(round_up(head_dim, kOperandWidth<E>)),
        value_width(round_up(value_dim, kWidth<T>)),
        // Rows an odd number of vectors apart do not compete for the same cache set.
        logits_stride((max_keys / kWidth<T> | 1) * kWidth<T>),
        queries(scratch.take<E>(kRowGroup<E> * query_width)),
        logits(scratch.take<T>(kRowGroup<E> * logits_stride)),
        key_tile{scratch.take<E>(max_keys * padded_depth<E>(head_dim)), scratch.take<E>(kMaxLastKeys * query_width),
                 head_dim, query_width},
        values(scratch.take<E>(max_keys * value_width)) {}

  void pack(Source keys, Source value_rows, int64_t count) {
    key_tile.pack(keys, count);
    pack_groups(value_rows, count, value_dim, values, value_width);
  }

  // Running softmax state of a group of queries. The accumulators start at zero, unless this is the only tile.
  struct Rows {
    Source queries;
    int64_t count;
    T* acc;               // [count, value_width]
    RowState<T>* states;  // [count]
    bool is_only_tile;
    // [count, bias_stride] if the terms reduce to a bias. If it is padded, it is read in whole vectors.
    const T* bias = nullptr;
    int64_t bias_stride = 0;
    bool bias_is_padded = true;
  };

  // Adds the keys that each row sees: visible(r), a range within `seen`. If `has_terms`, apply_terms(logits, r, columns,
  // first_key, scale) applies the score terms to a row of logits in place and returns its maximum. prefetch(turn) is
  // called four times and prefetches for a later tile: a single burst of requests would stall.
  template <class Visible, class ApplyTerms, class Prefetch>
  VK_INLINE void add(const Rows& rows, Range seen, T scale, bool has_terms, Visible&& visible, ApplyTerms&& apply_terms,
                     Prefetch&& prefetch) {
    const int64_t count = rows.count, first = seen.begin / kPanel<E> * kPanel<E>, columns = seen.end - first;
    const T left_scale = kFoldsScale<E> ? T(1) : scale;
    pack_queries(rows.queries, count, head_dim, scale, queries, query_width);  // [count, d]
    prefetch(0);
    key_tile.multiply(queries, count, {first, seen.end}, logits, logits_stride);  // [count, columns]
    prefetch(1);

    // First all maxima, then all exponentials: rows are independent, so the CPU overlaps them. Slower: reducing the lanes
    // of all rows together, for the maxima (7%) or the sums (5%); packing the 49th keys of 7 x 7 windows of all rows into
    // one vector (5%).
    T largest[kRowGroup<E>], factors[kRowGroup<E>];
    Range columns_of[kRowGroup<E>];
    bool are_alike = true;  // all rows see all columns
    for (int64_t r = 0; r < count; ++r) {
      columns_of[r] = relative_to(visible(r), first);
      are_alike = are_alike && columns_of[r].begin == 0 && columns_of[r].end == columns;
    }
    const LogitRows<T> group{logits, logits_stride, count, columns};
    if (are_alike && !has_terms) {
      find_maxima(group, left_scale, largest);
    } else if (are_alike && rows.bias) {
      const auto add = rows.bias_is_padded ? &add_bias<true, T> : &add_bias<false, T>;
      add(group, left_scale, rows.bias + first, rows.bias_stride, largest);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        T* row = logits + r * logits_stride;
        largest[r] =
            has_terms ? apply_terms(row, r, columns_of[r], first, left_scale) : row_max(row, columns_of[r], left_scale);
      }
    }
    prefetch(2);
    // apply_terms has scaled the logits.
    const T logit_scale = has_terms ? T(1) : left_scale;
    const int64_t depth = padded_depth<E>(columns);
    if (are_alike) {
      exponentiate_rows<E>(group, depth, logit_scale, largest, rows.states, factors);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        T* row = logits + r * logits_stride;
        factors[r] =
            exponentiate(row, reinterpret_cast<E*>(row), columns_of[r], depth, logit_scale, largest[r], rows.states[r]);
      }
    }
    if (!rows.is_only_tile) {
      for (int64_t r = 0; r < count; ++r) {
        if (factors[r] != T(1)) rescale(rows.acc + r * value_width, factors[r]);
      }
    }
    prefetch(3);
    const MatmulA<E> probabilities{reinterpret_cast<const E*>(logits), logits_stride * kGroup<E>, kGroup<E>};
    const MatmulB<E> value_rows{values + first * value_width, value_width * kGroup<E>, kPanel<E> * kGroup<E>};
    if (rows.is_only_tile) {
      matmul<E, false>(probabilities, value_rows, count, value_width, depth, rows.acc, value_width);  // [count, dv]
    } else {
      matmul<E, true>(probabilities, value_rows, count, value_width, depth, rows.acc, value_width);
    }
  }

  // Epilogue: normalizes the accumulators; row r is stored at out(r).
  template <class Out>
  VK_NOINLINE void finish(const RowResult<T>* results, T* acc, int64_t count, Out out) const {
    for (int64_t r = 0; r < count; ++r, acc += value_width) {
      const T factor = results[r].factor;
      if (factor == T(0)) clear<T>(acc, {0, value_width});  // saw no key: zero, whatever the accumulator holds
      unpack_rows<T>(acc, value_width, 1, value_dim, factor, out(r), 0);
    }
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
  T* logits;  // then the exponentials, as operands of the second product
  KeyTile<E> key_tile;
  E* values;
};

}  // namespace vitkernels::VK_ISA
