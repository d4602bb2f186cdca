// Products of one row with the listed rows of a tensor, for queries that are alone in their group: no other query shares
// the keys, so packing them would cost more than the products. Rows are read where they are.
#pragma once

#include "attention/listed.h"
#include "cpu/convert.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// The rows of listed tokens.
template <class S>
struct TokenRows {
  const S* first;  // of token 0
  int64_t stride;
  const int32_t* tokens;
  int64_t count;
  const S* outside = nullptr;  // of tokens outside the map; null: there are none

  VK_INLINE const S* operator[](int64_t i) const {
    const int64_t token = tokens[i];
    return outside && token < 0 ? outside : first + token * stride;
  }
};

// Vectors of a row that stay in registers.
inline constexpr int kMaxRowVectors = 8;

// Calls f(column, lanes of the last vector, number of vectors as a constant) for blocks of columns.
template <class T, class Function>
VK_INLINE void for_each_columns(int64_t columns, Function&& f) {
  constexpr int64_t kN = kWidth<T>;
  for (int64_t column = 0; column < columns; column += kMaxRowVectors * kN) {
    const int64_t left = std::min(columns - column, kMaxRowVectors * kN), vectors = (left + kN - 1) / kN;
    const int64_t lanes = left - (vectors - 1) * kN;
    [&]<std::size_t... kLess>(std::index_sequence<kLess...>) VK_BODY {
      ((vectors == int64_t(kLess) + 1 && (f(column, lanes, std::integral_constant<int, int(kLess) + 1>{}), true)) ||
       ...);
    }(std::make_index_sequence<kMaxRowVectors>());
  }
}

template <class T, int kVectors, class S>
VK_INLINE void load_row(const S* row, int64_t lanes, Vec<T> (&to)[kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    to[v] = load_widened<T>(row + v * kWidth<T>, v + 1 < kVectors ? kWidth<T> : lanes);
  }
}

// Lane i is the sum of the lanes of rows[i].
template <class T>
VK_INLINE Vec<T> sum_each(Vec<T> (&rows)[kWidth<T>]) {
  constexpr int kN = kWidth<T>;
#pragma GCC unroll 4
  for (int step = 1; step < kN; step *= 2) {
    const Bits<T> low = constant_lanes<Bits<T>>([=](int i) { return i & step ? kN + i - step : i; });
    const Bits<T> high = constant_lanes<Bits<T>>([=](int i) { return i & step ? kN + i : i + step; });
#pragma GCC unroll 16
    for (int i = 0; i < kN; i += 2 * step) {
      const Vec<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
  }
  return rows[0];
}

// products[i] = row . rows[i], in whole vectors: what lies behind the last row is undefined.
template <class T, class S>
VK_WHOLE void multiply_rows(const T* row, const TokenRows<S>& rows, int64_t columns, T* products) {
  constexpr int kN = kWidth<T>;
  for_each_columns<T>(columns, [&]<class Vectors>(int64_t column, int64_t lanes, Vectors) VK_BODY {
    constexpr int kVectors = Vectors::value;
    Vec<T> own[kVectors];
    load_row<T>(row + column, lanes, own);
    for (int64_t first = 0; first < rows.count; first += kN) {
      Vec<T> sums[kN];
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        Vec<T> other[kVectors];
        load_row<T>(rows[std::min(first + i, rows.count - 1)] + column, lanes, other);
        sums[i] = own[0] * other[0];
#pragma GCC unroll 8
        for (int v = 1; v < kVectors; ++v) sums[i] += own[v] * other[v];
      }
      const Vec<T> found = sum_each<T>(sums);
      store(products + first, column == 0 ? found : load(products + first) + found);
    }
  });
}

// sum = weights[i] * rows[i] over all i, in whole vectors.
template <class T, class S>
VK_WHOLE void add_rows(const T* weights, const TokenRows<S>& rows, int64_t columns, T* sum) {
  for_each_columns<T>(columns, [&]<class Vectors>(int64_t column, int64_t lanes, Vectors) VK_BODY {
    constexpr int kVectors = Vectors::value, kChains = kMaxRowVectors / kVectors;  // which hide the latency of a sum
    Vec<T> sums[kChains][kVectors] = {};
    const auto add = [&](int chain, int64_t i) VK_BODY {
      Vec<T> other[kVectors];
      load_row<T>(rows[i] + column, lanes, other);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[chain][v] += weights[i] * other[v];
    };
    int64_t i = 0;
    for (; i + kChains <= rows.count; i += kChains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain) add(chain, i + chain);
    }
    for (; i < rows.count; ++i) add(0, i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int chain = 1; chain < kChains; ++chain) sums[0][v] += sums[chain][v];
      store(sum + column + v * kWidth<T>, sums[0][v]);
    }
  });
}

// sums[tokens[i]] += weights[i] * row for the tokens on the map, in whole vectors; rows of sums are `width` apart.
template <class T>
VK_WHOLE void add_to_rows(const T* weights, const T* row, const int32_t* tokens, int64_t count, int64_t width,
                          T* sums) {
  for_each_columns<T>(width, [&]<class Vectors>(int64_t column, int64_t, Vectors) VK_BODY {
    constexpr int kVectors = Vectors::value;
    Vec<T> own[kVectors];
    load_row<T>(row + column, kWidth<T>, own);
    for (int64_t i = 0; i < count; ++i) {
      if (tokens[i] < 0) continue;
      T* const to = sums + tokens[i] * width + column;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(to + v * kWidth<T>, load(to + v * kWidth<T>) + weights[i] * own[v]);
    }
  });
}

// The query and the keys of a group of one head.
template <class S>
class LoneQuery {
 public:
  LoneQuery(const ListedParams& params, Scratch& scratch)
      : tokens(scratch.take<int32_t>(params.keys.max_tokens())),
        zeros(scratch.take<S>(std::max(params.problem.head_dim, params.problem.value_dim))) {}

  void clear_zeros(const ListedParams& params) {
    std::fill_n(zeros, std::max(params.problem.head_dim, params.problem.value_dim), S{});
  }

  // False if the group has no query.
  bool find(const ListedParams& params, int64_t batch, int64_t head, int64_t group) {
    const Problem& p = params.problem;
    query = -1;
    params.queries.for_each_token(batch, head, group, [&](int32_t token) { query = token; });
    if (query < 0) return false;
    const int64_t kv_head = params.heads.kv_head_of[head];
    const S* const outside = params.has_outside ? zeros : nullptr;
    int64_t count = 0;
    params.keys.for_each_token(batch, head, group, [&](int32_t token) {
      if (token >= 0 || outside) tokens[count++] = token;
    });
    keys = {p.key.at<const S>(batch, 0, kv_head), p.key.token_stride, tokens, count, outside};
    values = {p.value.at<const S>(batch, 0, kv_head), p.value.token_stride, tokens, count, outside};
    return true;
  }

  int64_t query = -1;
  TokenRows<S> keys, values;

 private:
  int32_t* tokens;
  S* zeros;
};

}  // namespace vitkernels::VK_ISA
