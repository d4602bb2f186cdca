// Score terms by offset on the CPU: expanded along one row of logits, and the gradients scattered back from it.
#pragma once

#include "attention/cpu/rel_pos.h"
#include "attention/cpu/softmax.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// All score terms along one row, including those by offset.
template <class T>
struct OffsetScoreRow {
  ScoreRow<T> others;
  TermRow<T> multiplier, bias;

  VK_INLINE Vec<T> apply(Vec<T> product, int64_t column, Range lanes) const {
    return others.apply(product * multiplier.at(column, lanes), column, lanes) + bias.at(column, lanes);
  }
  VK_INLINE Vec<T> to_product(Vec<T> grad, int64_t column, Range lanes) const {
    return others.to_product(grad * multiplier.at(column, lanes), column, lanes);
  }
};

// sums[0, count) += values[0, count), in whole vectors: zeros are added to the rest of the last one.
template <class Sum, class T>
VK_INLINE void add_to_sums(Sum* sums, const T* values, int64_t count) {
  constexpr int64_t kN = kWidth<Sum>;
  for (int64_t c = 0; c < count; c += kN) {
    Vec<Sum> added;
    if constexpr (std::is_same_v<T, Sum>) {
      added = load(values + c);
    } else {
      typedef T Part __attribute__((vector_size(kN * sizeof(T)), aligned(alignof(T)), may_alias));
      added = __builtin_convertvector(*reinterpret_cast<const Part*>(values + c), Vec<Sum>);
    }
    store(sums + c, load(sums + c) + (count - c < kN ? keep_first<Sum>(added, count - c, Sum(0)) : added));
  }
}

template <class T>
VK_INLINE T sum_of(const T* values, int64_t count) {
  Vec<T> sum{};
  for (int64_t c = 0; c < count; c += kWidth<T>) {
    const Vec<T> v = load(values + c);
    sum += count - c < kWidth<T> ? keep_first<T>(v, count - c, T(0)) : v;
  }
  return reduce_add<T>(sum);
}

// Expands the terms by offset along one row at a time, in the memory of a thread.
template <class T>
class OffsetRow {
 public:
  struct Sizes {
    int64_t head_dim, max_block, max_rows, max_keys;
    bool with_gradients;
  };

  OffsetRow(const Score& score, const Sizes& sizes, Scratch& scratch)
      : score(score), relative(score.by_offset, relative_sizes(score.by_offset.grid, sizes), scratch) {
    if (!terms.any()) return;
    const int64_t columns = round_up(sizes.max_keys, kWidth<T>) + kWidth<T>;  // and a vector of padding
    if (terms.multiplier.data) multiplier = scratch.take<T>(columns);
    if (terms.has_bias()) bias = scratch.take<T>(columns);
    if (!sizes.with_gradients) return;
    if (terms.multiplier.data) multiplier_gradient = scratch.take<T>(columns);
    bias_gradient = scratch.take<T>(columns);
  }

  // Before a block of queries and a KV tile.
  VK_NOINLINE void start_block(int64_t of_head, Range block, Range tile) {
    head = of_head;
    if (terms.has_rel_pos() && !tokens_on_grid(block).empty() && !tokens_on_grid(tile).empty()) {
      relative.pack(head, entries(tokens_on_grid(block), tokens_on_grid(tile)));
    }
  }

  // Before rows of the block are expanded; `queries` are their rows.
  template <class Rows>
  VK_NOINLINE void start_rows(Rows queries, Range rows, Range tile) {
    const Range placed = tokens_on_grid(rows);
    has_relative = terms.has_rel_pos() && !placed.empty() && !tokens_on_grid(tile).empty();
    if (!has_relative) return;
    first_placed = placed.begin;
    relative.multiply(queries.from(placed.begin + grid.num_prefix - rows.begin), placed.end - placed.begin,
                      entries(placed, tokens_on_grid(tile)));
  }

  // All terms of a query along the keys first_key + visible.
  VK_NOINLINE OffsetScoreRow<T> expand(int64_t batch, int64_t query, int64_t first_key, Range visible) {
    first_column = grid.num_prefix - first_key;
    token = query - grid.num_prefix;
    keys = relative_to(visible, first_column);
    keys.begin = std::max<int64_t>(keys.begin, 0);
    if (token < 0) keys.end = keys.begin;
    const Range others{visible.begin, keys.empty() ? visible.end : keys.begin + first_column};  // keys outside the grid
    if (multiplier) fill(multiplier, others, T(1));
    if (bias) fill(bias, others, T(0));
    if (!keys.empty()) {
      coord = grid.coord(token);
      const T* none[kMaxAxes] = {};
      const T* rows[kMaxAxes] = {};
      for (int axis = 0; axis < kMaxAxes; ++axis) {
        rows[axis] = relative.row(axis, token - first_placed, grid.first_entry(axis, coord));
      }
      if (multiplier) expand_into(multiplier, terms.multiplier, none);
      if (bias) expand_into(bias, terms.bias, rows);
    }
    return {ScoreRow<T>(score, batch, head, query, first_key), TermRow<T>(multiplier, &kOne<T>),
            TermRow<T>(bias, &kZero<T>)};
  }

  // One vector of the gradient of the row expanded last.
  VK_INLINE void set_gradient(const OffsetScoreRow<T>& row, Vec<T> grad, Vec<T> product, int64_t column, Range lanes) {
    store(bias_gradient + column, grad);
    if (multiplier) store(multiplier_gradient + column, row.others.to_product(grad * product, column, lanes));
  }

  // Adds the gradient of that row to the gradients of the terms.
  VK_NOINLINE void add_gradient(int64_t part) const {
    if (keys.empty()) return;
    add_to_table(terms.multiplier, multiplier_gradient, part);
    add_to_table(terms.bias, bias_gradient, part);
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      T* sums = relative.gradient_row(axis, token - first_placed, grid.first_entry(axis, coord));
      if (!sums) continue;
      grid.for_each_run(keys, [&](int64_t first, int64_t count, const Coord& key) {
        const T* gradient = bias_gradient + first_column + first;
        if (axis == kLast) {
          add_to_sums(sums + key.at[kLast], gradient, count);
        } else {
          sums[key.at[axis]] += sum_of(gradient, count);
        }
      });
    }
  }

  // After the last row. `query_gradient` is that of the first row, without the scale.
  VK_NOINLINE void finish_rows(int64_t part, Range rows, T* query_gradient, int64_t query_width) const {
    if (!has_relative) return;
    const int64_t first = tokens_on_grid(rows).begin + grid.num_prefix - rows.begin;
    relative.add_gradients(part, head, query_gradient + first * query_width);
  }

 private:
  static constexpr int kLast = kMaxAxes - 1;

  static typename RelativeLogits<T>::Sizes relative_sizes(const OffsetGrid& grid, const Sizes& sizes) {
    typename RelativeLogits<T>::Sizes result{sizes.head_dim, sizes.max_rows, {}, sizes.with_gradients};
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      result.max_entries[axis] = std::min(grid.size[axis], sizes.max_block) + std::min(grid.size[axis], sizes.max_keys);
    }
    return result;
  }

  EntryRanges entries(Range queries, Range keys_on_grid) const {
    EntryRanges result;
    for (int axis = 0; axis < kMaxAxes; ++axis) result[axis] = grid.entries(axis, queries, keys_on_grid);
    return result;
  }

  Range tokens_on_grid(Range tokens) const {
    return {std::max<int64_t>(tokens.begin - grid.num_prefix, 0), tokens.end - grid.num_prefix};
  }

  // Whole vectors: the next run overwrites what this one writes past its end.
  void expand_into(T* target, const TableTerm& term, const T* const (&rows)[kMaxAxes]) const {
    const T* table = static_cast<const T*>(term.data);
    if (table) table += head * term.head_stride + grid.query_entry(coord);
    grid.for_each_run(keys, [&](int64_t first, int64_t count, const Coord& key) {
      T* to = target + first_column + first;
      const T* from = table ? table + grid.key_entry(key) : nullptr;
      const T* along = rows[kLast] ? rows[kLast] + key.at[kLast] : nullptr;
      T same = 0;
      for (int axis = 0; axis < kLast; ++axis) {
        if (rows[axis]) same += rows[axis][key.at[axis]];
      }
      for (int64_t c = 0; c < count; c += kWidth<T>) {
        Vec<T> sum = from ? load(from + c) : Vec<T>{};
        if (along) sum += load(along + c);
        store(to + c, sum + same);
      }
    });
  }

  void add_to_table(const TableTerm& term, const T* gradient, int64_t part) const {
    if (!term.grad) return;
    double* sums = term.grad + part * term.grad_part_stride + head * term.grad_head_stride + grid.query_entry(coord);
    grid.for_each_run(keys, [&](int64_t first, int64_t count, const Coord& key) {
      add_to_sums(sums + grid.key_entry(key), gradient + first_column + first, count);
    });
  }

  VK_INLINE static void fill(T* row, Range columns, T value) {
    if (!columns.empty()) std::fill(row + columns.begin, row + columns.end, value);
  }

  const Score& score;
  const OffsetTerms& terms = score.by_offset;
  const OffsetGrid& grid = terms.grid;
  RelativeLogits<T> relative;
  T *multiplier = nullptr, *bias = nullptr, *multiplier_gradient = nullptr, *bias_gradient = nullptr;  // [columns]
  int64_t head = 0;
  bool has_relative = false;  // the rows have relative logits
  int64_t first_placed = 0;   // the first of them on the grid

  // Of the row expanded last.
  int64_t token = 0, first_column = 0;  // the query; the column of the first key on the grid
  Range keys{};
  Coord coord{};
};

}  // namespace vitkernels::VK_ISA
