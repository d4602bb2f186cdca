// What every backward pass through P = exp(S - lse) shares on the CPU: the order of the tasks, and the way from a row
// of logits S and the gradient of P to P and the gradient of S.
#pragma once

#include "attention/attention.h"
#include "attention/softmax_cpu.h"
#include "attention/tiles_cpu.h"
#include "cpu/convert.h"

namespace vitkernels::VK_ISA {

// Calls f(batch, kv head, split, tile) for the tiles of keys of the tasks [begin, end), in order.
template <class Function>
void for_each_key_tile(const AttentionBackwardParams& p, int64_t begin, int64_t end, Function&& f) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % p.splits;
    const int64_t head_group = task / p.splits % p.head_groups();
    const int64_t batch_group = task / p.splits / p.head_groups();
    const Range batches = p.batch_is_shared ? Range{0, p.batch} : Range{batch_group, batch_group + 1};
    const Range kv_heads = p.heads_are_shared ? Range{0, p.kv_heads} : Range{head_group, head_group + 1};
    for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
      const Axis axis = p.sequence(batch).axis;
      const Tiling keys = backward_keys(axis);
      const Range tiles{keys.count * split / p.splits, keys.count * (split + 1) / p.splits};
      for (int64_t kv_head = kv_heads.begin; kv_head < kv_heads.end; ++kv_head) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
          f(batch, kv_head, split, Range{tile * keys.size, std::min((tile + 1) * keys.size, axis.num_keys)});
        }
      }
    }
  }
}

// The gradient of a score term along one row of the logits.
template <class T>
struct TermGradRow {
  T* data = nullptr;
  double* sums = nullptr;  // instead of data, where an element sums many rows
  int64_t stride;          // 0 or 1

  TermGradRow(const ScoreTerm& term, int64_t batch, int64_t head, int64_t query, int64_t first_key)
      : stride(term.grad_strides.key) {
    if (!term.grad) return;
    const int64_t offset = term.grad_strides.offset(batch, head, query, first_key);
    if (term.grad_is_double) {
      sums = static_cast<double*>(term.grad) + offset;
    } else {
      data = static_cast<T*>(term.grad) + offset;
    }
  }

  VK_INLINE void add(Vec<T> grad, int64_t column, Range lanes) const {
    if (data) add_to(data, grad, column, lanes);
    if (sums) add_to(sums, grad, column, lanes);
  }

 private:
  template <class Sum>
  VK_INLINE void add_to(Sum* target, Vec<T> grad, int64_t column, Range lanes) const {
    const Vec<T> inside = keep(grad, lanes, T(0));
    if (stride == 0) {
      *target += reduce_add<T>(inside);
      return;
    }
    T values[kWidth<T>];
    store(values, inside);
    if (lanes.end == kWidth<T>) {
      for (int i = 0; i < kWidth<T>; ++i) target[column + i] += values[i];
    } else {
      for (int i = 0; i < lanes.end; ++i) target[column + i] += values[i];
    }
  }
};

// A row of a tile of logits: its query sees the columns `visible` of `width`, the first of which is key `first_key`.
struct LogitRow {
  int64_t batch, head, query, first_key;
  Range visible;
  int64_t width;
};

template <class T>
void differentiate_terms(const Score& s, const LogitRow& at, T scale, T offset, T delta, T* logits, T* gradients) {
  const ScoreRow<T> score(s, at.batch, at.head, at.query, at.first_key);
  const TermGradRow<T> multiplier(s.multiplier, at.batch, at.head, at.query, at.first_key);
  const TermGradRow<T> bias(s.bias, at.batch, at.head, at.query, at.first_key);
  const TermGradRow<T> key_bias(s.key_bias, at.batch, at.head, at.query, at.first_key);
  for_each_vector<T>(at.visible, [&](int64_t c, Range lanes) {
    const Vec<T> product = load(logits + c) * scale;
    const Vec<T> x = score.apply(product, c, lanes);
    const Vec<T> prob = keep(exp<T>(x - offset), lanes, T(0));
    const Vec<T> grad = prob * (load(gradients + c) - delta);
    multiplier.add(grad * product, c, lanes);
    bias.add(grad, c, lanes);
    key_bias.add(grad, c, lanes);
    store(logits + c, prob);
    store(gradients + c, keep(grad * score.multiplier.at(c, lanes), lanes, T(0)));
  });
}

// S, dP -> P, dS = P * (dP - delta) of one row, in place; gradients of the score terms on the way. `scale` is what the
// products in S still lack.
template <class T>
void differentiate_row(const Score& score, const LogitRow& at, T scale, T lse, T delta, T* logits, T* gradients) {
  const T offset = exponent_offset(lse);
  if (score.has_terms()) {
    differentiate_terms(score, at, scale, offset, delta, logits, gradients);
  } else {
    for_each_vector<T>(at.visible, [&](int64_t c, Range lanes) {
      const Vec<T> prob = keep(exp<T>(load(logits + c) * scale - offset), lanes, T(0));
      store(logits + c, prob);
      store(gradients + c, keep(prob * (load(gradients + c) - delta), lanes, T(0)));
    });
  }
  clear_outside(logits, at.visible, at.width);
  clear_outside(gradients, at.visible, at.width);
}

// The product of two rows, each a tensor's or ours.
template <class T, class A, class B>
T dot_rows(const A* a, const B* b, int64_t count) {
  Vec<T> sum{};
  for_each_vector<T>({0, count}, [&](int64_t c, Range lanes) {
    sum += load_widened<T>(a + c, lanes.end) * load_widened<T>(b + c, lanes.end);
  });
  return reduce_add<T>(sum);
}

// The first of the splits' rows, `part` apart, becomes the sum of all, in order.
template <class T>
void sum_splits(T* sum, int64_t width, int64_t splits, int64_t part) {
  for (int64_t s = 1; s < splits; ++s) {
    for (int64_t c = 0; c < width; c += kWidth<T>) store(sum + c, load(sum + c) + load(sum + s * part + c));
  }
}

}  // namespace vitkernels::VK_ISA
