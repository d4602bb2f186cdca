// One row of logits on the CPU: score terms, running maximum, exponentials.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/score.h"
#include "cpu/convert.h"
#include "cpu/math.h"
#include "cpu/matmul.h"

namespace vitkernels::VK_ISA {

// Calls f(column, lanes) for each aligned vector that overlaps `range`; `lanes` are the lanes inside.
template <class T, class Function>
VK_INLINE void for_each_vector(Range range, Function&& f) {
  constexpr int64_t kN = kWidth<T>;
  int64_t column = range.begin & -kN;
  if (column < range.begin && column < range.end) {
    f(column, Range{range.begin - column, std::min(kN, range.end - column)});
    column += kN;
  }
  for (; column + kN <= range.end; column += kN) f(column, Range{0, kN});
  if (column < range.end) f(column, Range{0, range.end - column});
}

// Lanes inside `lanes` keep their value, the others become `other`.
template <class T>
VK_INLINE Vec<T> keep(Vec<T> v, Range lanes, T other) {
  if (lanes.begin == 0 && lanes.end == kWidth<T>) return v;
  using Int = typename VectorOf<T>::Int;
  const Bits<T> lane = lane_index<T>();
  const Bits<T> inside = (lane >= (Int(lanes.begin) - Bits<T>{})) & (lane < (Int(lanes.end) - Bits<T>{}));
  return inside ? v : broadcast(other);
}

// A score term along one row of logits, from a given column on.
template <class T>
struct TermRow {
  const T* data;
  int64_t stride;  // 0 or 1

  TermRow(const ScoreTerm& term, int64_t batch, int64_t head, int64_t query, int64_t first_key, const T* absent)
      : data(term.data ? static_cast<const T*>(term.data) + term.strides.offset(batch, head, query, first_key)
                       : absent),
        stride(term.data ? term.strides.key : 0) {}
  TermRow(const T* row, const T* absent) : data(row ? row : absent), stride(row != nullptr) {}

  VK_INLINE Vec<T> at(int64_t column, Range lanes) const {
    if (stride == 0) return broadcast(*data);
    return lanes.end == kWidth<T> ? load(data + column) : load_partial(data + column, lanes.end);
  }
};

template <class T>
inline constexpr T kZero = 0;
template <class T>
inline constexpr T kOne = 1;

// All score terms along one row.
template <class T>
struct ScoreRow {
  TermRow<T> multiplier, bias, key_bias;

  ScoreRow(const Score& s, int64_t batch, int64_t head, int64_t query, int64_t first_key)
      : multiplier(s.multiplier, batch, head, query, first_key, &kOne<T>),
        bias(s.bias, batch, head, query, first_key, &kZero<T>),
        key_bias(s.key_bias, batch, head, query, first_key, &kZero<T>) {}

  ScoreRow(const T* multiplier, const T* bias, const T* key_bias)
      : multiplier(multiplier, &kOne<T>), bias(bias, &kZero<T>), key_bias(key_bias, &kZero<T>) {}

  VK_INLINE Vec<T> apply(Vec<T> product, int64_t column, Range lanes) const {
    return logit(product, multiplier.at(column, lanes), bias.at(column, lanes), key_bias.at(column, lanes));
  }
  // The gradient of the product from that of the logit.
  VK_INLINE Vec<T> to_product(Vec<T> grad, int64_t column, Range lanes) const {
    return grad * multiplier.at(column, lanes);
  }
};

// Whether the only term is a bias along the keys.
inline bool is_bias_along_keys(const Score& s) {
  return s.bias.data && s.bias.strides.key == 1 && !s.multiplier.data && !s.key_bias.data && !s.by_offset.any();
}

// A bias alone. If it is padded, it may be read in whole vectors.
template <class T, bool kIsPadded = true>
struct BiasRow {
  const T* bias;

  VK_INLINE Vec<T> apply(Vec<T> product, int64_t column, Range lanes) const {
    if (kIsPadded || lanes.end == kWidth<T>) return product + load(bias + column);
    return product + load_partial(bias + column, lanes.end);
  }
  VK_INLINE Vec<T> to_product(Vec<T> grad, int64_t, Range) const { return grad; }
};

template <class T>
inline constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// The softmax statistics of one row: exponentials are exp(logit - max), `sum` is their sum.
template <class T>
struct RowState {
  T max = kMinusInfinity<T>, sum = 0;

  // Subtracted from logits before exp. A row that has seen no key yet must not compute inf - inf.
  T offset() const { return max == kMinusInfinity<T> ? T(0) : max; }
  T lse() const { return sum > 0 || sum != sum ? max + std::log(sum) : kMinusInfinity<T>; }
};

// Final statistics: LSE and `factor` = 1 / sum, which is zero for a row that saw no key.
template <class T>
struct RowResult {
  T lse, factor;
};

// For many rows at once; both arrays are padded to whole vectors.
template <class T>
void finish_rows(const RowState<T>* states, int64_t count, RowResult<T>* results) {
  constexpr int kN = kWidth<T>;
  const auto even = constant_lanes<Bits<T>>([](int i) { return 2 * i; }), odd = even + 1;
  const auto low = constant_lanes<Bits<T>>([](int i) { return i / 2 + i % 2 * kN; }), high = low + kN / 2;
  for (int64_t r = 0; r < count; r += kN) {
    const T* from = reinterpret_cast<const T*>(states + r);
    const Vec<T> a = load(from), b = load(from + kN);
    const Vec<T> largest = __builtin_shuffle(a, b, even), sum = __builtin_shuffle(a, b, odd);
    const Bits<T> is_empty = sum == Vec<T>{};
    const Vec<T> lse = is_empty ? broadcast(kMinusInfinity<T>) : largest + log<T>(sum);
    const Vec<T> factor = is_empty ? Vec<T>{} : T(1) / sum;
    T* to = reinterpret_cast<T*>(results + r);
    store(to, __builtin_shuffle(lse, factor, low));
    store(to + kN, __builtin_shuffle(lse, factor, high));
  }
}

// Subtracted from logits so that exp gives probabilities. An empty row (lse = -inf) gets P = exp(-inf) = 0.
template <class T>
VK_INLINE T exponent_offset(T lse) {
  return lse == kMinusInfinity<T> ? -kMinusInfinity<T> : lse;
}

// Applies the score terms to logits[visible] in place and returns their maximum. `scale` is not yet in the products.
template <class T, class Row>
VK_INLINE T apply_score(T* logits, Range visible, T scale, const Row& score) {
  Vec<T> largest = broadcast(kMinusInfinity<T>);
  for_each_vector<T>(visible, [&](int64_t column, Range lanes) {
    const Vec<T> x = score.apply(load(logits + column) * scale, column, lanes);
    store(logits + column, x);
    largest = max<T>(largest, keep(x, lanes, kMinusInfinity<T>));
  });
  return reduce_max<T>(largest);
}

template <class T>
VK_INLINE T row_max(const T* logits, Range visible, T scale) {
  Vec<T> largest = broadcast(kMinusInfinity<T>);
  for_each_vector<T>(visible, [&](int64_t column, Range lanes) {
    largest = max<T>(largest, keep(load(logits + column) * scale, lanes, kMinusInfinity<T>));
  });
  return reduce_max<T>(largest);
}

// Zeros whole vectors of T, or of operands in their place, from the first column on.
template <class T, class E>
VK_INLINE void clear(E* row, Range columns) {
  for (int64_t c = columns.begin; c < columns.end; c += kWidth<T>) store_narrowed<T>(row + c, Vec<T>{}, kWidth<T>);
}

// Zeros the vectors below `width` that for_each_vector<T> has not written for `visible`.
template <class T, class E>
VK_INLINE void clear_outside(E* row, Range visible, int64_t width) {
  if (visible.empty()) return clear<T>(row, {0, width});
  clear<T>(row, {0, visible.begin / kWidth<T> * kWidth<T>});
  clear<T>(row, {round_up(visible.end, kWidth<T>), width});
}

template <class T>
VK_NOINLINE void scale_row(T* logits, Range visible, T scale) {
  for_each_vector<T>(visible, [&](int64_t column, Range) { store(logits + column, load(logits + column) * scale); });
}

// The factor that is left for exp(logits * scale - offset). An FMA subtracts from the exact product, but the offset stems
// from rounded ones: where their difference is no longer small, the logits are scaled in place first.
template <class T>
VK_INLINE T remaining_scale(T* logits, Range visible, T scale, T offset) {
  constexpr T kLargest = 1 << 15;  // products below are rounded by 2^-9 at most, as little as bfloat16 itself
  if (scale == T(1) || std::abs(offset) <= kLargest) return scale;
  scale_row(logits, visible, scale);
  return T(1);
}

// probabilities[visible] = exp(logits - max), zero in the other columns below `width`; may be in place. Updates the
// running state and returns the factor that rescales the accumulator.
template <class E, class T>
VK_INLINE T exponentiate(T* logits, E* probabilities, Range visible, int64_t width, T scale, T largest,
                         RowState<T>& state) {
  const T before = state.offset(), was_max = state.max;
  state.max = std::max(state.max, largest);
  const T offset = state.offset();
  scale = remaining_scale(logits, visible, scale, offset);
  Vec<T> sum{};
  for_each_vector<T>(visible, [&](int64_t column, Range lanes) {
    const Vec<T> p = keep(exp<T, E>(load(logits + column) * scale - offset), lanes, T(0));
    store_narrowed<T>(probabilities + column, p, kWidth<T>);
    sum += p;
  });
  clear_outside<T>(probabilities, visible, width);
  const T factor = was_max == kMinusInfinity<T> ? T(0) : exp<T>(broadcast(before - offset))[0];
  state.sum = state.sum * factor + reduce_add<T>(sum);
  return factor;
}

// A group of rows that see all of the first `columns`. Its loops are functions of their own: inlined into a kernel, the
// compiler spills their variables.
template <class T>
struct LogitRows {
  T* data;  // [count, stride]
  int64_t stride, count, columns;
};

template <class T>
VK_NOINLINE void find_maxima(const LogitRows<T>& rows, T scale, T* largest) {
  for (int64_t r = 0; r < rows.count; ++r) largest[r] = row_max(rows.data + r * rows.stride, {0, rows.columns}, scale);
}

template <bool kIsPadded, class T>
VK_NOINLINE void add_bias(const LogitRows<T>& rows, T scale, const T* bias, int64_t bias_stride, T* largest) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const BiasRow<T, kIsPadded> of_row{bias + r * bias_stride};
    largest[r] = apply_score(rows.data + r * rows.stride, {0, rows.columns}, scale, of_row);
  }
}

template <class E, class T>
VK_NOINLINE void exponentiate_rows(const LogitRows<T>& rows, int64_t width, T scale, const T* largest,
                                   RowState<T>* states, T* factors) {
  for (int64_t r = 0; r < rows.count; ++r) {
    T* row = rows.data + r * rows.stride;
    factors[r] = exponentiate(row, reinterpret_cast<E*>(row), {0, rows.columns}, width, scale, largest[r], states[r]);
  }
}

}  // namespace vitkernels::VK_ISA
