// Shared by the backward passes through P = exp(S - lse) on the CPU: the order of tasks, and the step from a row of S and
// dP to P and dS.
#pragma once

#include "attention/cpu/offset_grid.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tile_sizes.h"
#include "cpu/convert.h"

namespace vitkernels::VK_ISA {

// A KV tile of the heads that share it. `part` is the partial sum that a task adds to, of gradients that every key
// contributes to.
struct KeyTileTask {
  int64_t batch, kv_head, split, part;
  Range tile;
};

// Calls f(KeyTileTask) for the KV tiles of the tasks [begin, end), in order.
template <class Function>
void for_each_key_tile(const AttentionBackwardParams& params, int64_t begin, int64_t end, Function&& f) {
  const Problem& p = params.forward.problem;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % params.splits;
    const int64_t head_group = task / params.splits % params.head_groups();
    const int64_t batch_group = task / params.splits / params.head_groups();
    const int64_t batch_groups = params.batch_groups();
    const Range batches{p.batch * batch_group / batch_groups, p.batch * (batch_group + 1) / batch_groups};
    const Range kv_heads = params.heads_are_shared ? Range{0, p.kv_heads} : Range{head_group, head_group + 1};
    for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
      const Axis axis = params.forward.sequence(batch).axis;
      const Tiling keys = backward_keys(axis);
      const Range tiles{keys.count * split / params.splits, keys.count * (split + 1) / params.splits};
      for (int64_t kv_head = kv_heads.begin; kv_head < kv_heads.end; ++kv_head) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
          f(KeyTileTask{batch,
                        kv_head,
                        split,
                        batch_group * params.splits + split,
                        {tile * keys.size, std::min((tile + 1) * keys.size, axis.num_keys)}});
        }
      }
    }
  }
}

// The gradient of a score term along one row of logits.
template <class T>
struct TermGradRow {
  T* data = nullptr;
  double* sums = nullptr;  // instead of data, if an element accumulates many rows
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

// A row of a logit tile: its query sees the columns `visible` out of `width`; column 0 is key `first_key`.
struct LogitRow {
  int64_t batch, head, query, first_key;
  Range visible;
  int64_t width;
};

// The gradients along one row of all terms but the tables and embeddings by offset.
template <class T>
struct ScoreGradRow {
  TermGradRow<T> multiplier, bias, key_bias;

  ScoreGradRow(const Score& s, const LogitRow& at)
      : multiplier(s.multiplier, at.batch, at.head, at.query, at.first_key),
        bias(s.bias, at.batch, at.head, at.query, at.first_key),
        key_bias(s.key_bias, at.batch, at.head, at.query, at.first_key) {}

  VK_INLINE void add(Vec<T> grad, Vec<T> product, int64_t column, Range lanes) const {
    multiplier.add(grad * product, column, lanes);
    bias.add(grad, column, lanes);
    key_bias.add(grad, column, lanes);
  }
};

// Scalars of one row: `scale` is not yet in S, P = exp(S - offset).
template <class T>
struct RowNumbers {
  T scale, offset, delta;
};

// Calls add_gradient(grad, product, column, lanes) for every vector of dS.
template <class T, class Row, class Function>
VK_INLINE void differentiate_score(const Row& score, Range visible, RowNumbers<T> with, T* logits, T* gradients,
                                   Function&& add_gradient) {
  for_each_vector<T>(visible, [&](int64_t c, Range lanes) {
    const Vec<T> product = load(logits + c) * with.scale;
    const Vec<T> x = score.apply(product, c, lanes);
    const Vec<T> prob = keep(exp<T>(x - with.offset), lanes, T(0));
    const Vec<T> grad = prob * (load(gradients + c) - with.delta);
    add_gradient(grad, product, c, lanes);
    store(logits + c, prob);
    store(gradients + c, keep(score.to_product(grad, c, lanes), lanes, T(0)));
  });
}

// Without terms.
template <class T>
VK_INLINE void differentiate_products(Range visible, RowNumbers<T> with, T* logits, T* gradients) {
  with.scale = remaining_scale(logits, visible, with.scale, with.offset);
  for_each_vector<T>(visible, [&](int64_t c, Range lanes) VK_BODY {
    const Vec<T> prob = keep(exp<T>(load(logits + c) * with.scale - with.offset), lanes, T(0));
    store(logits + c, prob);
    store(gradients + c, keep(prob * (load(gradients + c) - with.delta), lanes, T(0)));
  });
}

// With a bias alone that differs from key to key, whose loop asks for no other term. Sum: the type of the bias gradient.
template <class T, class Sum>
VK_NOINLINE void differentiate_bias(const T* bias, Sum* sums, Range visible, RowNumbers<T> with, T* logits,
                                    T* gradients) {
  constexpr int64_t kN = kWidth<T>;
  for_each_vector<T>(visible, [&](int64_t c, Range lanes) VK_BODY {
    const Vec<T> term = lanes.end == kN ? load(bias + c) : load_partial(bias + c, lanes.end);
    const Vec<T> prob = keep(exp<T>(load(logits + c) * with.scale + term - with.offset), lanes, T(0));
    const Vec<T> grad = keep(prob * (load(gradients + c) - with.delta), lanes, T(0));
    store(logits + c, prob);
    store(gradients + c, grad);
    if (!sums) return;
    if (lanes.end == kN) {
      typedef Sum Sums __attribute__((vector_size(kN * sizeof(Sum)), aligned(alignof(Sum)), may_alias));
      *reinterpret_cast<Sums*>(sums + c) += __builtin_convertvector(grad, Sums);
    } else {
      for (int64_t i = 0; i < lanes.end; ++i) sums[c + i] += grad[i];
    }
  });
}

template <class T>
VK_WHOLE void differentiate_terms(const Score& s, const LogitRow& at, RowNumbers<T> with, T* logits, T* gradients,
                                  OffsetRow<T>* offset_row, int64_t part) {
  if (is_bias_along_keys(s) && (!s.bias.grad || s.bias.grad_strides.key == 1)) {
    const T* bias =
        static_cast<const T*>(s.bias.data) + s.bias.strides.offset(at.batch, at.head, at.query, at.first_key);
    const TermGradRow<T> sums(s.bias, at.batch, at.head, at.query, at.first_key);
    if (sums.sums) return differentiate_bias(bias, sums.sums, at.visible, with, logits, gradients);
    return differentiate_bias(bias, sums.data, at.visible, with, logits, gradients);
  }
  const ScoreGradRow<T> score_gradients(s, at);
  if (!s.by_offset.any()) {
    const ScoreRow<T> score(s, at.batch, at.head, at.query, at.first_key);
    differentiate_score(score, at.visible, with, logits, gradients,
                        [&](auto... vector) { score_gradients.add(vector...); });
    return;
  }
  const OffsetScoreRow<T> score = offset_row->expand(at.batch, at.query, at.first_key, at.visible);
  differentiate_score(score, at.visible, with, logits, gradients,
                      [&](Vec<T> grad, Vec<T> product, int64_t c, Range lanes) {
                        score_gradients.add(grad, product * score.multiplier.at(c, lanes), c, lanes);
                        offset_row->set_gradient(score, grad, product, c, lanes);
                      });
  offset_row->add_gradient(part);
}

// S, dP -> P, dS = P * (dP - delta) for one row, in place. Adds the gradients of the score terms, those by offset to the
// partial sum `part`.
template <class T>
VK_INLINE void differentiate_row(const Score& score, const LogitRow& at, RowNumbers<T> with, T* logits, T* gradients,
                                 OffsetRow<T>* offset_row = nullptr, int64_t part = 0) {
  if (score.has_terms()) {
    differentiate_terms(score, at, with, logits, gradients, offset_row, part);
  } else {
    differentiate_products(at.visible, with, logits, gradients);
  }
  clear_outside<T>(logits, at.visible, at.width);
  clear_outside<T>(gradients, at.visible, at.width);
}

// The dot product of two rows of any element type.
template <class T, class A, class B>
T dot_rows(const A* a, const B* b, int64_t count) {
  Vec<T> sum{};
  for_each_vector<T>({0, count}, [&](int64_t c, Range lanes) {
    sum += load_widened<T>(a + c, lanes.end) * load_widened<T>(b + c, lanes.end);
  });
  return reduce_add<T>(sum);
}

// Adds the rows of all splits, `part` apart, to that of the first, in order.
template <class T>
void sum_splits(T* sum, int64_t width, int64_t splits, int64_t part) {
  for (int64_t s = 1; s < splits; ++s) {
    for (int64_t c = 0; c < width; c += kWidth<T>) store(sum + c, load(sum + c) + load(sum + s * part + c));
  }
}

}  // namespace vitkernels::VK_ISA
