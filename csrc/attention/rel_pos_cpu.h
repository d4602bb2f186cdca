// Relative logits on the CPU: products of queries with embeddings of their offsets from the keys, axis by axis.
//
// A row of queries is multiplied with a stretch of embeddings, all those that some pair of the rows and a tile of keys
// has; each row then reads its own part of the product, from its own shift on.
#pragma once

#include "attention/score.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

template <class T>
class RelativeLogits {
 public:
  // A block of queries shares packed embeddings; a group of its rows is multiplied at once.
  struct Sizes {
    int64_t head_dim, most_block, most_rows, most_keys;
    bool with_gradients;
  };

  RelativeLogits(const GridTerms& terms, const Sizes& sizes, Scratch& scratch)
      : terms(terms), grid(terms.grid), head_dim(sizes.head_dim), query_width(round_up(head_dim, kWidth<T>)) {
    if (!terms.has_rel_pos()) return;
    queries = scratch.take<T>(sizes.most_rows * query_width);
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      Axis& axis = axes[i];
      const int64_t most = std::min(grid.size[i], sizes.most_block) + std::min(grid.size[i], sizes.most_keys);
      axis.stride = round_up(most, kPanel<T>) + 2 * kPanel<T>;  // an aligned beginning; whole vectors at the end
      axis.panels = scratch.take<T>(round_up(most, kPanel<T>) * head_dim);
      axis.logits = scratch.take<T>(sizes.most_rows * axis.stride);
      if (sizes.with_gradients) axis.gradients = scratch.take<T>(sizes.most_rows * axis.stride);
    }
  }

  // Packs what a block of queries and a tile of keys need. Tokens are counted from the first on the grid.
  void pack(int64_t head, Range block, Range keys) {
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      const Range entries = grid.entries(i, block, keys);
      axes[i].packed_begin = entries.begin;
      pack_transposed(row_of(i, head, entries.begin), terms.rel_pos[i].row_stride, entries.end - entries.begin,
                      head_dim, axes[i].panels);
    }
  }

  // Multiplies some rows of the block.
  template <class S>
  void multiply(const S* query_rows, int64_t query_stride, Range rows, Range keys) {
    first_row = rows.begin, num_rows = rows.end - rows.begin;
    pack_rows<T>(query_rows, query_stride, num_rows, head_dim, T(1), queries, query_width);  // [rows, d]
    for (int i = 0; i < kMaxAxes; ++i) {
      if (!terms.rel_pos[i].data) continue;
      Axis& axis = axes[i];
      const Range entries = grid.entries(i, rows, keys);
      const int64_t panel = (entries.begin - axis.packed_begin) / kPanel<T>;
      axis.entries = {axis.packed_begin + panel * kPanel<T>, entries.end};
      matmul<T, false>({queries, query_width, 1},
                       {axis.panels + panel * head_dim * kPanel<T>, kPanel<T>, head_dim * kPanel<T>}, num_rows,
                       round_up(axis.count(), kWidth<T>), head_dim, axis.logits, axis.stride);  // [rows, entries]
      if (axis.gradients) std::fill_n(axis.gradients, num_rows * axis.stride, T(0));
    }
  }

  // The logits of a query on one axis by the key's coordinate, or null; and where their gradient is summed.
  const T* row(int axis, int64_t query, const Place& place) const {
    return terms.rel_pos[axis].data ? axes[axis].logits + begin_of_row(axis, query, place) : nullptr;
  }
  T* gradient_row(int axis, int64_t query, const Place& place) const {
    return terms.rel_pos[axis].data ? axes[axis].gradients + begin_of_row(axis, query, place) : nullptr;
  }

  // From the summed gradients to those of the embeddings and of the rows' queries.
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

  int64_t begin_of_row(int axis, int64_t query, const Place& place) const {
    return (query - first_row) * axes[axis].stride + grid.first_entry(axis, place) - axes[axis].entries.begin;
  }

  const GridTerms& terms;
  const Grid& grid;
  const int64_t head_dim, query_width;
  T* queries = nullptr;  // [rows, query_width], not scaled
  Axis axes[kMaxAxes];
  int64_t first_row = 0, num_rows = 0;
};

}  // namespace vitkernels::VK_ISA
