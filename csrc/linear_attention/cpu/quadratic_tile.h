// The quadratic form of linear attention on the CPU: A = scale phi(q) phi(k)^T, of so few queries or keys that this is less
// work than a state. All keys of a (batch, kv head) pair lie in scratch.
#pragma once

#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {

// Rows of all keys, as they are and as columns of a product.
template <class T>
struct QuadraticRows {
  QuadraticRows(int64_t count, int64_t columns, Scratch& scratch)
      : count(count),
        columns(columns),
        width(round_up(columns, kWidth<T>)),
        rows(scratch.take<T>(count * width)),
        panels(scratch.take<T>(divide_up(count, kPanel<T>) * kPanel<T> * columns)) {}

  void pack_panels() { pack_transposed(EvenRows<T>{rows, width}, count, columns, panels); }

  MatmulB<T> by_rows() const { return {rows, width, kPanel<T>}; }                     // [keys, columns]
  MatmulB<T> by_columns() const { return {panels, kPanel<T>, columns * kPanel<T>}; }  // [columns, keys]

  int64_t count, columns, width;
  T *rows, *panels;
};

// A block of queries of a head against all keys.
template <class T>
struct QuadraticBlock {
  QuadraticBlock(const LinearProblem& p, Scratch& scratch)
      : p(p),
        features(p),
        width(round_up(p.num_keys, kWidth<T>)),
        phi(scratch.take<T>(kLinearBlock * features.width)),
        products(scratch.take<T>(kLinearBlock * width)),
        sums(scratch.take<T>(kLinearBlock)) {}

  template <class S>
  void multiply(EvenRows<S> queries, int64_t count, const QuadraticRows<T>& keys) {
    features.apply(queries, count, phi);  // [queries, d]
    matmul<T, false>({phi, features.width, 1}, keys.by_columns(), count, width, p.head_dim, products,
                     width);  // [queries, keys]
    for (int64_t r = 0; r < count; ++r) {
      T* const row = products + r * width;
      std::fill(row + p.num_keys, row + width, T(0));
      Vec<T> sum{};
      for (int64_t c = 0; c < width; c += kWidth<T>) {
        const Vec<T> x = load(row + c) * T(p.scale);
        store(row + c, x);
        sum += x;
      }
      sums[r] = p.normalizes ? reduce_add<T>(sum) + T(p.eps) : T(1);
    }
  }

  const LinearProblem& p;
  const Features<T> features;
  const int64_t width;
  T *phi, *products, *sums;  // sums plus eps, or ones: what a row is divided by
};

// The reciprocal of a small number is infinite, so that rows are divided; by zero they become zero.
template <class T>
VK_INLINE Vec<T> divided(Vec<T> x, T by) {
  return by == T(0) ? Vec<T>{} : x / broadcast(by);
}

}  // namespace vitkernels::VK_ISA
