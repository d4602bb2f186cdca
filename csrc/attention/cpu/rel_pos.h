// Relative logits on the CPU: products of queries with embeddings of their offsets from the keys, axis by axis.
//
// A group of queries is multiplied with the run of embeddings that any of its pairs with a KV tile needs; each row then
// reads the product from a shift of its own.
#pragma once

#include <array>

#include "attention/score.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// Of each axis.
using EntryRanges = std::array<Range, kMaxAxes>;

template <class T>
class RelativeLogits {
 public:
  // A block of queries shares packed embeddings; a group of rows is multiplied at once.
  struct Sizes {
    int64_t head_dim, max_rows, max_entries[kMaxAxes];
    bool with_gradients;
  };

  RelativeLogits(const OffsetTerms& terms, const Sizes& sizes, Scratch& scratch)
      : terms(terms), head_dim(sizes.head_dim), query_width(round_up(head_dim, kWidth<T>)) {
    if (!terms.has_rel_pos()) return;
    queries = scratch.take<T>(sizes.max_rows * query_width);
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      Axis& axis = axes[i];
      const int64_t max_columns = round_up(sizes.max_entries[i], kPanel<T>);
      axis.stride = max_columns + 2 * kPanel<T>;  // aligned start, whole vectors at the end
      axis.panels = scratch.take<T>(max_columns * head_dim);
      axis.logits = scratch.take<T>(sizes.max_rows * axis.stride);
      if (sizes.with_gradients) axis.gradients = scratch.take<T>(sizes.max_rows * axis.stride);
    }
  }

  // Packs the embeddings that a block of queries and a KV tile need.
  void pack(int64_t head, const EntryRanges& entries) {
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      axes[i].packed_begin = entries[i].begin;
      const EvenRows<T> rows{row_of(i, head, entries[i].begin), terms.rel_pos[i].row_stride};
      pack_transposed(rows, entries[i].end - entries[i].begin, head_dim, axes[i].panels);
    }
  }

  // Multiplies a group of the rows with the packed embeddings that it needs.
  template <class Rows>
  void multiply(Rows query_rows, int64_t rows, const EntryRanges& entries) {
    num_rows = rows;
    pack_rows<T>(query_rows, num_rows, head_dim, T(1), queries, query_width);  // [rows, d]
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      Axis& axis = axes[i];
      const int64_t panel = (entries[i].begin - axis.packed_begin) / kPanel<T>;
      axis.entries = {axis.packed_begin + panel * kPanel<T>, entries[i].end};
      matmul<T, false>({queries, query_width, 1},
                       {axis.panels + panel * head_dim * kPanel<T>, kPanel<T>, head_dim * kPanel<T>}, num_rows,
                       round_up(axis.count(), kWidth<T>), head_dim, axis.logits, axis.stride);  // [rows, entries]
      if (axis.gradients) std::fill_n(axis.gradients, num_rows * axis.stride, T(0));
    }
  }

  // The relative logits of a row on one axis, or null, and their gradient's accumulator. Key k is at index k if
  // `first_entry` is the entry of key 0.
  const T* row(int axis, int64_t r, int64_t first_entry) const {
    return terms.rel_pos[axis].data ? axes[axis].logits + begin_of_row(axis, r, first_entry) : nullptr;
  }
  T* gradient_row(int axis, int64_t r, int64_t first_entry) const {
    return terms.rel_pos[axis].data ? axes[axis].gradients + begin_of_row(axis, r, first_entry) : nullptr;
  }

  // From the accumulated gradients to those of the embeddings and of the queries.
  void add_gradients(int64_t part, int64_t head, T* query_gradient) const {
    for (int i = 0; i < kMaxAxes; ++i) {
      const RelPosTerm& term = terms.rel_pos[i];
      if (!term.data) continue;
      const Axis& axis = axes[i];
      matmul<T, true>({axis.gradients, axis.stride, 1},
                      {row_of(i, head, axis.entries.begin), term.row_stride, kPanel<T>}, num_rows, query_width,
                      axis.count(), query_gradient, query_width);  // [rows, d]
      if (!term.grad) continue;
      T* grad = static_cast<T*>(term.grad) + part * term.grad_part_stride + head * term.grad_head_stride +
                axis.entries.begin * term.row_stride;
      matmul<T, true>({axis.gradients, 1, axis.stride}, {queries, query_width, kPanel<T>}, axis.count(), query_width,
                      num_rows, grad, term.row_stride);  // [entries, d]
    }
  }

 private:
  struct Axis {
    int64_t stride = 0, packed_begin = 0;
    T *panels = nullptr, *logits = nullptr, *gradients = nullptr;  // [entries, d] in panels, [rows, stride] twice
    Range entries{};                                               // of logits and gradients

    int64_t count() const { return entries.end - entries.begin; }
  };

  const T* row_of(int axis, int64_t head, int64_t entry) const {
    const RelPosTerm& term = terms.rel_pos[axis];
    return static_cast<const T*>(term.data) + head * term.head_stride + entry * term.row_stride;
  }

  int64_t begin_of_row(int axis, int64_t r, int64_t first_entry) const {
    return r * axes[axis].stride + first_entry - axes[axis].entries.begin;
  }

  const OffsetTerms& terms;
  const int64_t head_dim, query_width;
  T* queries = nullptr;  // [rows, query_width], not scaled
  Axis axes[kMaxAxes];
  int64_t num_rows = 0;
};

}  // namespace vitkernels::VK_ISA
