// A tile of keys and values, and what groups of queries add to their sums from it. The forward kernels share it.
//
// Queries go through in groups of as many rows as the register tile has: their logits stay in the first-level cache from
// the first product to the second.
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

  void pack(Source keys, Source value_rows, int64_t count) {
    key_tile.pack(keys, count);
    pack_groups(value_rows, count, value_dim, values, value_width);
  }

  // What rows of queries have come to. Sums are zero at first, unless this tile is all that they see.
  struct Rows {
    Source queries;
    int64_t count;
    T* sums;              // [count, value_width]
    RowState<T>* states;  // [count]
    bool is_only_tile;
    // [count, bias_stride], if it is all that is done to the logits. Whole vectors of it are read.
    const T* bias = nullptr;
    int64_t bias_stride = 0;
  };

  // Adds the keys that row r sees, the range visible(r) of the tile, within `seen`. apply_terms(logits, r, columns,
  // first_key, scale) does what is done to a row of logits in place and returns their maximum; `has_terms` says whether
  // anything is. meanwhile(turn) may fetch what will be needed later, in four turns: all requests at once would have to
  // wait.
  template <class Visible, class ApplyTerms, class Meanwhile>
  VK_INLINE void add(const Rows& rows, Range seen, T scale, bool has_terms, Visible&& visible, ApplyTerms&& apply_terms,
                     Meanwhile&& meanwhile) {
    const int64_t count = rows.count, first = seen.begin / kPanel<E> * kPanel<E>, columns = seen.end - first;
    const T left_scale = kFoldsScale<E> ? T(1) : scale;
    pack_queries(rows.queries, count, head_dim, scale, queries, query_width);  // [count, d]
    meanwhile(0);
    key_tile.multiply(queries, count, {first, seen.end}, logits, logits_stride);  // [count, columns]
    meanwhile(1);

    // Maxima first, exponentials after: the rows of a loop are independent and overlap in the CPU. What was tried to do
    // less and took longer: to add up the lanes of a vector for all rows together, for the maxima (7%) or for the sums
    // (5%); to put the 49th keys of 7 x 7 windows, of all rows, into one vector (5%).
    T largest[kRowGroup<E>], factors[kRowGroup<E>];
    Range columns_of[kRowGroup<E>];
    bool are_alike = true;  // all rows see the same columns
    for (int64_t r = 0; r < count; ++r) {
      columns_of[r] = relative_to(visible(r), first);
      are_alike = are_alike && columns_of[r].begin == 0 && columns_of[r].end == columns;
    }
    const LogitRows<T> group{logits, logits_stride, count, columns};
    if (are_alike && !has_terms) {
      find_maxima(group, left_scale, largest);
    } else if (are_alike && rows.bias) {
      add_bias(group, left_scale, rows.bias + first, rows.bias_stride, largest);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        T* row = logits + r * logits_stride;
        largest[r] =
            has_terms ? apply_terms(row, r, columns_of[r], first, left_scale) : row_max(row, columns_of[r], left_scale);
      }
    }
    meanwhile(2);
    // Their terms applied, logits need no factor any more.
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
        if (factors[r] != T(1)) rescale(rows.sums + r * value_width, factors[r]);
      }
    }
    meanwhile(3);
    const MatmulA<E> probabilities{reinterpret_cast<const E*>(logits), logits_stride * kGroup<E>, kGroup<E>};
    const MatmulB<E> value_rows{values + first * value_width, value_width * kGroup<E>, kPanel<E> * kGroup<E>};
    if (rows.is_only_tile) {
      matmul<E, false>(probabilities, value_rows, count, value_width, depth, rows.sums, value_width);  // [count, dv]
    } else {
      matmul<E, true>(probabilities, value_rows, count, value_width, depth, rows.sums, value_width);
    }
  }

  // The outputs of rows from their sums; that of row r goes to out(r).
  template <class Out>
  VK_NOINLINE void finish(const RowResult<T>* results, T* sums, int64_t count, Out out) const {
    for (int64_t r = 0; r < count; ++r, sums += value_width) {
      const T factor = results[r].factor;
      if (factor == T(0)) clear<T>(sums, {0, value_width});  // saw no key: zero, whatever the row holds
      unpack_rows<T>(sums, value_width, 1, value_dim, factor, out(r), 0);
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
  T* logits;  // then the exponentials, as operands
  KeyTile<E> key_tile;
  E* values;
};

}  // namespace vitkernels::VK_ISA
