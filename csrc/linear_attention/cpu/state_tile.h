// What the kernels of linear attention on the CPU share: operands of their products, and the state in scratch.
#pragma once

#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "linear_attention/cpu/features.h"
#include "linear_attention/tiles.h"

namespace vitkernels::VK_ISA {

// Rows of a tensor as an operand: in place where its elements are those of the arithmetic and its columns whole vectors,
// else copied to a buffer.
template <class T>
struct OperandRows {
  const T* data;
  int64_t stride;

  template <class S>
  OperandRows(EvenRows<S> rows, int64_t count, int64_t columns, T* buffer) {
    if constexpr (std::is_same_v<S, T>) {
      if (columns % kWidth<T> == 0) {
        data = rows.data, stride = rows.stride;
        return;
      }
    }
    data = buffer, stride = round_up(columns, kWidth<T>);
    pack_rows(rows, count, columns, T(1), buffer, stride);
  }

  MatmulA<T> as_a() const { return {data, stride, 1}; }
  MatmulB<T> as_b() const { return {data, stride, kPanel<T>}; }
};

// acc [columns of a, width] += a^T b for `count` rows of both.
template <class T>
void add_products(const T* a, int64_t a_width, int64_t a_columns, MatmulB<T> b, int64_t width, int64_t count, T* acc) {
  matmul<T, true>({a, 1, a_width}, b, a_columns, width, count, acc, width);
}

// acc [width] += the sum of rows [count, width], each times its weight if there are any.
template <class T>
void add_rows(const T* rows, int64_t width, int64_t count, const T* weights, T* acc) {
  for (int64_t c = 0; c < width; c += kWidth<T>) {
    Vec<T> sum{};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<T> x = load(rows + r * width + c);
      sum += weights ? x * broadcast(weights[r]) : x;
    }
    store(acc + c, load(acc + c) + sum);
  }
}

template <class T>
VK_INLINE T dot(const T* a, const T* b, int64_t width) {
  Vec<T> sum{};
  for (int64_t c = 0; c < width; c += kWidth<T>) sum += load(a + c) * load(b + c);
  return reduce_add<T>(sum);
}

// A state [head_dim, value_dim + 1] in scratch: its sums of products, as they are and transposed, and its sums of
// features; all padded with zeros.
template <class T>
struct StateTile {
  StateTile(const LinearProblem& p, Scratch& scratch)
      : head_dim(p.head_dim),
        value_dim(p.value_dim),
        width(round_up(p.value_dim, kWidth<T>)),
        feature_width(round_up(p.head_dim, kWidth<T>)),
        products(scratch.take<T>(head_dim * width)),
        transposed(scratch.take<T>(value_dim * feature_width)),
        sums(scratch.take<T>(feature_width)) {}

  void load_from(const T* state, T factor) {
    std::fill_n(products, head_dim * width, T(0));
    std::fill_n(transposed, value_dim * feature_width, T(0));
    std::fill_n(sums, feature_width, T(0));
    for (int64_t d = 0; d < head_dim; ++d, state += value_dim + 1) {
      for (int64_t v = 0; v < value_dim; ++v) {
        products[d * width + v] = transposed[v * feature_width + d] = state[v] * factor;
      }
      sums[d] = state[value_dim] * factor;
    }
  }

  MatmulB<T> by_features() const { return {products, width, kPanel<T>}; }          // [d, dv]
  MatmulB<T> by_values() const { return {transposed, feature_width, kPanel<T>}; }  // [dv, d]

  int64_t head_dim, value_dim, width, feature_width;
  T *products, *transposed, *sums;
};

// Partial sums of a state: [splits][batch, kv head][padded products, padded sums].
template <class T>
struct StateParts {
  StateParts(const LinearProblem& p, int64_t splits, void* parts)
      : head_dim(p.head_dim),
        value_dim(p.value_dim),
        width(round_up(p.value_dim, kWidth<T>)),
        size(head_dim * width + round_up(p.head_dim, kWidth<T>)),
        pairs(p.batch * p.kv_heads),
        splits(splits),
        data(static_cast<T*>(parts)) {}

  int64_t bytes() const { return splits * pairs * size * int64_t(sizeof(T)); }

  T* cleared(int64_t split, int64_t pair) const {
    T* const part = data + (split * pairs + pair) * size;
    std::fill_n(part, size, T(0));
    return part;
  }
  T* sums_of(T* part) const { return part + head_dim * width; }

  // state = factor * the parts' sum.
  void add_up(int64_t pair, T factor, void* state) const {
    T* to = static_cast<T*>(state) + pair * head_dim * (value_dim + 1);
    for (int64_t d = 0; d < head_dim; ++d, to += value_dim + 1) {
      for (int64_t v = 0; v <= value_dim; ++v) {
        T sum = 0;
        for (int64_t split = 0; split < splits; ++split) {
          const T* const part = data + (split * pairs + pair) * size;
          sum += v < value_dim ? part[d * width + v] : part[head_dim * width + d];
        }
        to[v] = factor * sum;
      }
    }
  }

  int64_t head_dim, value_dim, width, size, pairs, splits;
  T* data;
};

template <class S>
EvenRows<S> rows_of(const TokenTensor& t, int64_t batch, int64_t token, int64_t head) {
  return {t.at<const S>(batch, token, head), t.token_stride};
}

// Calls f(first, count) for blocks of a range of tokens.
template <class Function>
void for_each_block(Range tokens, Function&& f) {
  for (int64_t first = tokens.begin; first < tokens.end; first += kLinearBlock) {
    f(first, std::min(tokens.end - first, kLinearBlock));
  }
}

}  // namespace vitkernels::VK_ISA
