// Score terms by place on a grid, on the CPU: expanded along one row of the logits, and their gradients gathered from it.
#pragma once

#include "attention/softmax_cpu.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// All score terms along one row, those of the grid among them.
template <class T>
struct GridScoreRow {
  ScoreRow<T> others;
  TermRow<T> multiplier, bias;

  VK_INLINE Vec<T> apply(Vec<T> product, int64_t column, Range lanes) const {
    return others.apply(product * multiplier.at(column, lanes), column, lanes) + bias.at(column, lanes);
  }
  VK_INLINE Vec<T> factor(int64_t column, Range lanes) const {
    return others.factor(column, lanes) * multiplier.at(column, lanes);
  }
};

// sums[0, count) += values[0, count). Whole vectors: zeros are added behind.
template <class T>
VK_INLINE void add_to_sums(double* sums, const T* values, int64_t count) {
  constexpr int64_t kN = kWidth<double>;
  for (int64_t c = 0; c < count; c += kN) {
    Vec<double> added;
    if constexpr (std::is_same_v<T, double>) {
      added = load(values + c);
    } else {
      typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(alignof(float)), may_alias));
      added = __builtin_convertvector(*reinterpret_cast<const Half*>(values + c), Vec<double>);
    }
    if (count - c < kN) added = keep_first<double>(added, count - c, 0.0);
    store(sums + c, load(sums + c) + added);
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

// The grid's terms along one row at a time, in a thread's own memory.
template <class T>
class GridRow {
 public:
  GridRow(const Score& score, int64_t most_keys, bool with_gradients, Scratch& scratch) : score(score) {
    if (!terms.any()) return;
    const int64_t columns = round_up(most_keys, kWidth<T>) + kWidth<T>;  // and the rest of a vector behind
    if (terms.multiplier.data) multiplier = scratch.take<T>(columns);
    if (terms.has_bias()) bias = scratch.take<T>(columns);
    if (terms.axis_bias[kLast].data) last_axis = scratch.take<T>(grid.size[kLast] + kWidth<T>);
    if (!with_gradients) return;
    if (terms.multiplier.data) multiplier_gradient = scratch.take<T>(columns);
    bias_gradient = scratch.take<T>(columns);
    if (terms.axis_bias[kLast].data) last_axis_gradient = scratch.take<T>(grid.size[kLast]);
  }

  // All terms of a query along the keys first_key + visible.
  GridScoreRow<T> expand(int64_t batch, int64_t head, int64_t query, int64_t first_key, Range visible) {
    first_column = grid.num_prefix - first_key;
    token = query - grid.num_prefix;
    keys = relative_to(visible, first_column);
    keys.begin = std::max<int64_t>(keys.begin, 0);
    if (token < 0) keys.end = keys.begin;
    const Range others{visible.begin, keys.empty() ? visible.end : keys.begin + first_column};  // keys without a place
    if (multiplier) fill(multiplier, others, T(1));
    if (bias) fill(bias, others, T(0));
    if (!keys.empty()) {
      place = grid.place(token);
      if (multiplier) expand_into(multiplier, entries(terms.multiplier, head), {});
      if (bias) expand_into(bias, entries(terms.bias, head), axis_rows(batch, head));
    }
    return {ScoreRow<T>(score, batch, head, query, first_key), TermRow<T>(multiplier, &kOne<T>),
            TermRow<T>(bias, &kZero<T>)};
  }

  // One vector of the gradient of the row that was expanded last.
  VK_INLINE void set_gradient(const GridScoreRow<T>& row, Vec<T> grad, Vec<T> product, int64_t column, Range lanes) {
    store(bias_gradient + column, grad);
    if (multiplier) store(multiplier_gradient + column, grad * product * row.others.factor(column, lanes));
  }

  // Adds the gradient of that row to those of the terms.
  void add_gradient(int64_t part, int64_t batch, int64_t head) {
    if (keys.empty()) return;
    add_to_table(terms.multiplier, multiplier_gradient, part, head);
    add_to_table(terms.bias, bias_gradient, part, head);
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const ScoreTerm& term = terms.axis_bias[axis];
      if (!term.grad) continue;
      T* row = static_cast<T*>(term.grad) + term.grad_strides.offset(batch, head, token, 0);
      if (axis == kLast) {
        add_to_last_axis(row);
      } else {
        for_each_run([&](const T* gradient, int64_t count, const Place& key) {
          row[grid.offset(axis, place, key)] += sum_of(gradient, count);
        });
      }
    }
  }

 private:
  static constexpr int kLast = kMaxAxes - 1;

  struct AxisRows {
    const T* row[kMaxAxes] = {};  // of the query, by offset
  };

  AxisRows axis_rows(int64_t batch, int64_t head) {
    AxisRows rows;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const ScoreTerm& term = terms.axis_bias[axis];
      if (term.data) rows.row[axis] = static_cast<const T*>(term.data) + term.strides.offset(batch, head, token, 0);
    }
    if (rows.row[kLast]) {
      const T* from = rows.row[kLast] + last_offset();
      const Range columns = on_last_axis();
      for (int64_t c = columns.begin; c < columns.end; ++c) last_axis[c] = from[-c];
    }
    return rows;
  }

  int64_t last_offset() const { return place.at[kLast] + grid.size[kLast] - 1; }  // from the key at 0

  // The last coordinates of `keys`.
  Range on_last_axis() const {
    const int64_t size = grid.size[kLast], first = keys.begin % size, count = keys.end - keys.begin;
    return first + count <= size ? Range{first, first + count} : Range{0, size};
  }

  const T* entries(const TableTerm& table, int64_t head) const {
    if (!table.data) return nullptr;
    return static_cast<const T*>(table.data) + head * table.head_stride + grid.query_entry(place);
  }

  // Whole vectors: what a run writes too much, the next one overwrites.
  void expand_into(T* target, const T* table, const AxisRows& rows) const {
    grid.for_each_run(keys, [&](int64_t first, int64_t count, const Place& key) {
      T* to = target + first_column + first;
      const T* from = table ? table + grid.key_entry(key) : nullptr;
      const T* along = rows.row[kLast] ? last_axis + key.at[kLast] : nullptr;
      T same = 0;
      for (int axis = 0; axis < kLast; ++axis) {
        if (rows.row[axis]) same += rows.row[axis][grid.offset(axis, place, key)];
      }
      for (int64_t c = 0; c < count; c += kWidth<T>) {
        Vec<T> sum = from ? load(from + c) : Vec<T>{};
        if (along) sum += load(along + c);
        store(to + c, sum + same);
      }
    });
  }

  template <class Function>
  VK_INLINE void for_each_run(Function&& f) const {
    grid.for_each_run(keys, [&](int64_t first, int64_t count, const Place& key) {
      f(bias_gradient + first_column + first, count, key);
    });
  }

  void add_to_table(const TableTerm& table, const T* gradient, int64_t part, int64_t head) const {
    if (!table.grad) return;
    double* sums = table.grad + part * table.grad_part_stride + head * table.grad_stride + grid.query_entry(place);
    grid.for_each_run(keys, [&](int64_t first, int64_t count, const Place& key) {
      add_to_sums(sums + grid.key_entry(key), gradient + first_column + first, count);
    });
  }

  void add_to_last_axis(T* row) const {
    const Range columns = on_last_axis();
    fill(last_axis_gradient, columns, T(0));
    for_each_run([&](const T* gradient, int64_t count, const Place& key) {
      T* to = last_axis_gradient + key.at[kLast];
      for (int64_t c = 0; c < count; ++c) to[c] += gradient[c];
    });
    for (int64_t c = columns.begin; c < columns.end; ++c) row[last_offset() - c] += last_axis_gradient[c];
  }

  VK_INLINE static void fill(T* row, Range columns, T value) {
    if (!columns.empty()) std::fill(row + columns.begin, row + columns.end, value);
  }

  const Score& score;
  const GridTerms& terms = score.on_grid;
  const Grid& grid = terms.grid;
  T *multiplier = nullptr, *bias = nullptr, *multiplier_gradient = nullptr, *bias_gradient = nullptr;  // [columns]
  T *last_axis = nullptr, *last_axis_gradient = nullptr;  // [size of the last axis]: of the query, by key

  // Of the row that was expanded last.
  int64_t token = 0, first_column = 0;  // the query; the column of the first key with a place
  Range keys{};
  Place place{};
};

}  // namespace vitkernels::VK_ISA
