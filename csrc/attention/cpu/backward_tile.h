// A KV tile with its gradients, to which blocks of queries add. The backward kernels share it.
//
// Five products per tile of keys and block of queries:
//   S = Q K^T, dP = dO V^T, then with P = exp(S - lse) and dS = P * (dP - delta):
//   dV += P^T dO, dK += dS^T Q, dQ += dS K.
#pragma once

#include "attention/cpu/forward_tile.h"
#include "attention/cpu/tile_sizes.h"

namespace vitkernels::VK_ISA {

// Keys, values, queries and gradients of outputs are read through `Source` (cpu/rows.h).
template <class S, class Source = EvenRows<S>>
class BackwardTile {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  BackwardTile(int64_t head_dim, int64_t value_dim, int64_t max_keys, Scratch& scratch)
      : head_dim(head_dim), value_dim(value_dim), max_keys(max_keys), scratch(scratch) {}

  // Also zeros the gradients of the tile.
  void pack(Source keys, Source values, int64_t count) {
    key_tile.pack(keys, count);
    pack_transposed(values, count, value_dim, value_panels);
    pack_groups(keys, count, head_dim, key_groups, query_width);
    std::fill_n(key_gradient, count * query_width, T(0));
    std::fill_n(value_gradient, count * value_width, T(0));
  }

  struct Rows {
    Source queries, out_gradient;
    int64_t count;
    T* query_gradient;  // [count, query_width], without the scale: dS K is added, or stored if this is the only tile
    bool is_only_tile = false;
  };

  // Adds the contribution of at most kBackwardQueryBlock rows, limited to the keys `seen`. differentiate(r, first_key,
  // width, logits, gradients) turns a row of S into P and a row of dP into dS; columns are relative to first_key, and
  // masked columns below `width` become zero. prefetch(turn) is called eight times and prefetches for a later tile.
  template <class Differentiate, class Prefetch>
  VK_INLINE void add(const Rows& rows, Range seen, T scale, Differentiate&& differentiate, Prefetch&& prefetch) {
    const int64_t count = rows.count, first_key = seen.begin / kPanel<E> * kPanel<E>, columns = seen.end - first_key;
    const int64_t depth = padded_depth<E>(count), key_depth = padded_depth<E>(columns);
    const int64_t value_depth = padded_depth<E>(value_dim);

    pack_queries(rows.queries, count, head_dim, scale, queries, operand_width);            // [count, d]
    pack_operands(rows.out_gradient, count, value_dim, out_gradient, out_gradient_width);  // [count, dv]
    prefetch(0);
    key_tile.multiply(queries, count, {first_key, seen.end}, logits, logits_stride);  // [count, columns]
    prefetch(1);
    matmul<E, false>({out_gradient, out_gradient_width, kGroup<E>},
                     {value_panels + first_key * value_depth, panel_stride, value_depth * kPanel<E>}, count,
                     round_up(columns, kWidth<T>), value_depth, gradients, logits_stride);  // [count, columns]
    prefetch(2);
    for (int64_t r = 0; r < count; ++r) {
      differentiate(r, first_key, key_depth, logits + r * logits_stride, gradients + r * logits_stride);
    }
    prefetch(3);

    const auto [probs, grads, grad_rows, out_gradient_groups, query_groups] = operands(rows, key_depth, scale);
    prefetch(4);
    // P^T and dS^T are read in place: the next row is the next group.
    matmul<E, true>({probs, kGroup<E>, group_stride}, {out_gradient_groups, value_width * kGroup<E>, panel_stride},
                    columns, value_width, depth, value_gradient + first_key * value_width, value_width);  // [keys, dv]
    prefetch(5);
    matmul<E, true>({grads, kGroup<E>, group_stride}, {query_groups, query_width * kGroup<E>, panel_stride}, columns,
                    query_width, depth, key_gradient + first_key * query_width, query_width);  // [keys, d]
    prefetch(6);
    const MatmulA<E> score_gradients{grad_rows, logits_stride, kGroup<E>};
    const MatmulB<E> key_rows{key_groups + first_key * query_width, query_width * kGroup<E>, panel_stride};
    if (rows.is_only_tile) {
      matmul<E, false>(score_gradients, key_rows, count, query_width, key_depth, rows.query_gradient,
                       query_width);  // [count, d]
    } else {
      matmul<E, true>(score_gradients, key_rows, count, query_width, key_depth, rows.query_gradient, query_width);
    }
    prefetch(7);
  }

 private:
  const int64_t head_dim, value_dim, max_keys;
  Scratch& scratch;

 public:
  const int64_t query_width = round_up(head_dim, kWidth<T>);
  const int64_t value_width = round_up(value_dim, kWidth<T>);

 private:
  // Operands of the last three products.
  struct Operands {
    const E *probs, *grads;  // P, scale * dS as groups of rows: [count / kGroup, group_stride]
    const E* grad_rows;      // dS: [count, logits_stride]
    const E *out_gradient_groups, *query_groups;
  };

  // If operands are narrower than accumulators, P and dS are rounded and grouped in place.
  Operands operands(const Rows& rows, int64_t columns, T scale) {
    if constexpr (kGroup<E> == 1) {
      return {logits, gradients, gradients, out_gradient, queries};  // the queries hold the scale
    } else {
      const int64_t count = rows.count;
      const auto row_of = [&](T* data, int64_t r) { return r < count ? data + r * logits_stride : nullptr; };
      for (int64_t r = 0; r < padded_depth<E>(count); r += 2) {
        const T *first = row_of(gradients, r), *second = row_of(gradients, r + 1);
        if (first) narrow_row(first, columns, gradient_rows + r * logits_stride);
        if (second) narrow_row(second, columns, gradient_rows + (r + 1) * logits_stride);
        narrow_groups(first, second, columns, scale, gradients + r * logits_stride);
        narrow_groups(row_of(logits, r), row_of(logits, r + 1), columns, T(1), logits + r * logits_stride);
      }
      pack_groups(rows.queries, count, head_dim, query_pairs, query_width);
      pack_groups(rows.out_gradient, count, value_dim, out_gradient_pairs, value_width);
      return {reinterpret_cast<E*>(logits), reinterpret_cast<E*>(gradients), gradient_rows, out_gradient_pairs,
              query_pairs};
    }
  }

  const int64_t logits_stride = (max_keys / kWidth<T> | 1) * kWidth<T>;
  const int64_t operand_width = round_up(head_dim, kOperandWidth<E>);
  const int64_t out_gradient_width = round_up(value_dim, kOperandWidth<E>);
  const int64_t group_stride = logits_stride * kGroup<E> * (sizeof(T) / sizeof(E));  // of P and dS
  static constexpr int64_t panel_stride = kPanel<E> * kGroup<E>;
  static constexpr int64_t block_rows = padded_depth<E>(kBackwardQueryBlock);

  E* queries = scratch.take<E>(block_rows * operand_width);
  E* out_gradient = scratch.take<E>(block_rows * out_gradient_width);
  T* logits = scratch.take<T>(block_rows * logits_stride);     // then P
  T* gradients = scratch.take<T>(block_rows * logits_stride);  // dP, then dS
  KeyTile<E> key_tile{scratch.take<E>(max_keys * padded_depth<E>(head_dim)),
                      scratch.take<E>(kMaxLastKeys* operand_width), head_dim, operand_width};
  E* value_panels = scratch.take<E>(max_keys * padded_depth<E>(value_dim));
  E* key_groups = scratch.take<E>(max_keys * query_width);
  // Used only if operands are pairs.
  static constexpr int64_t kPairRows = kGroup<E> == 1 ? 0 : block_rows;
  E* gradient_rows = scratch.take<E>(kPairRows * logits_stride);
  E* query_pairs = scratch.take<E>(kPairRows * query_width);
  E* out_gradient_pairs = scratch.take<E>(kPairRows * value_width);

 public:
  T* key_gradient = scratch.take<T>(max_keys * query_width);
  T* value_gradient = scratch.take<T>(max_keys * value_width);
};

}  // namespace vitkernels::VK_ISA
