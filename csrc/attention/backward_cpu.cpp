// Backward of softmax attention on the CPU. Compiled once per instruction set.
//
// Five products per tile of keys and block of queries:
//   S = Q K^T, dP = dO V^T, then with P = exp(S - lse) and dS = P * (dP - delta):
//   dV += P^T dO, dK += dS^T Q, dQ += dS K.
// A task is a range of keys (a split) of a group of heads that share a gradient. It alone writes their key and value
// gradients and these keys' columns of the bias gradients; sums over batch and heads run inside it, in order.

#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/logits_cpu.h"
#include "attention/softmax_cpu.h"
#include "attention/tiles_cpu.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

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

template <class T, class A, class B>
T dot_rows(const A* a, const B* b, int64_t count) {
  Vec<T> sum{};
  for_each_vector<T>({0, count}, [&](int64_t c, Range lanes) {
    sum += load_widened<T>(a + c, lanes.end) * load_widened<T>(b + c, lanes.end);
  });
  return reduce_add<T>(sum);
}

template <class S>
class Backward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Backward(const AttentionBackwardParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const { return p.splits * p.heads * p.num_rows() * query_width * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles_of_thread;
    for (int64_t task = begin; task < end; ++task) {
      split = task % p.splits;
      const int64_t head_group = task / p.splits % p.head_groups();
      const int64_t batch_group = task / p.splits / p.head_groups();
      const Range batches = p.batch_is_shared ? Range{0, p.batch} : Range{batch_group, batch_group + 1};
      const Range kv_heads = p.heads_are_shared ? Range{0, p.kv_heads} : Range{head_group, head_group + 1};
      for (batch = batches.begin; batch < batches.end; ++batch) {
        start_sequence();
        const Range tiles{keys.count * split / p.splits, keys.count * (split + 1) / p.splits};
        for (kv_head = kv_heads.begin; kv_head < kv_heads.end; ++kv_head) {
          for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            tile_of_keys({tile * keys.size, std::min((tile + 1) * keys.size, axis.num_keys)});
          }
        }
      }
    }
  }

  // dQ of some (batch, head) pairs: the splits' parts, added in order, times the scale.
  void finish(int64_t begin, int64_t end) {
    const int64_t part = p.heads * p.num_rows() * query_width;
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      start_sequence();
      for (int64_t query = 0; query < axis.num_queries; ++query) {
        const int64_t token = sequence.first_query + query;
        T* sum = query_gradient(0, query);
        for (int64_t s = 1; s < p.splits; ++s) {
          for (int64_t c = 0; c < query_width; c += kWidth<T>) {
            store(sum + c, load(sum + c) + load(sum + s * part + c));
          }
        }
        if (p.query_dot) {
          static_cast<T*>(p.query_dot)[head * p.num_rows() + sequence.first_row + query] =
              dot_rows<T>(p.query.at<const S>(batch, token, head), sum, p.head_dim);
        }
        unpack_rows<T>(sum, query_width, 1, p.head_dim, p.score.scale_of<T>(head),
                       p.grad_query.at<S>(batch, token, head), p.grad_query.token_stride);
      }
    }
  }

 private:
  void start_sequence() {
    sequence = p.sequence(batch);
    axis = sequence.axis;
    keys = backward_keys(axis);
  }

  void tile_of_keys(Range tile) {
    const int64_t count = tile.end - tile.begin, first = sequence.first_key + tile.begin;
    const S* key_rows = p.key.at<const S>(batch, first, kv_head);
    const S* value_rows = p.value.at<const S>(batch, first, kv_head);
    key_tile.pack(key_rows, p.key.token_stride, count);
    pack_transposed(value_rows, p.value.token_stride, count, p.value_dim, value_panels);
    pack_groups(key_rows, p.key.token_stride, count, p.head_dim, key_groups, query_width);
    std::fill_n(key_gradient, count * query_width, T(0));
    std::fill_n(value_gradient, count * value_width, T(0));

    const int64_t blocks = divide_up(axis.num_queries, kBackwardQueryBlock);
    for (int64_t i = p.first_head[kv_head]; i < p.first_head[kv_head + 1]; ++i) {
      head = p.head_list[i];
      for (int64_t block = 0; block < blocks; ++block) {
        block_of_queries({axis.num_queries * block / blocks, axis.num_queries * (block + 1) / blocks}, tile);
      }
    }
    unpack_rows<T>(key_gradient, query_width, count, p.head_dim, T(1), p.grad_key.at<S>(batch, first, kv_head),
                   p.grad_key.token_stride);
    unpack_rows<T>(value_gradient, value_width, count, p.value_dim, T(1), p.grad_value.at<S>(batch, first, kv_head),
                   p.grad_value.token_stride);
  }

  void block_of_queries(Range rows, Range tile) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile), tile.begin);
    if (seen.empty()) return;
    const int64_t count = rows.end - rows.begin, first = sequence.first_query + rows.begin;
    const int64_t width = round_up(seen.end, kWidth<T>), depth = padded_depth<E>(count);
    const int64_t key_depth = padded_depth<E>(seen.end);
    const S* query_rows = p.query.at<const S>(batch, first, head);
    const S* out_gradient_rows = p.grad_out.at<const S>(batch, first, head);

    const T scale = p.score.scale_of<T>(head);
    pack_queries(query_rows, p.query.token_stride, count, p.head_dim, scale, queries, operand_width);  // [count, d]
    pack_operands(out_gradient_rows, p.grad_out.token_stride, count, p.value_dim, out_gradient,
                  out_gradient_width);                                   // [count, dv]
    key_tile.multiply(queries, count, seen.end, logits, logits_stride);  // [count, seen]
    matmul<E, false>({out_gradient, out_gradient_width, kGroup<E>},
                     {value_panels, kPanel<E> * kGroup<E>, padded_depth<E>(p.value_dim) * kPanel<E>}, count, width,
                     padded_depth<E>(p.value_dim), gradients, logits_stride);  // [count, width]

    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      differentiate_row(query, visible, key_depth, tile.begin, kFoldsScale<E> ? T(1) : scale,
                        logits + r * logits_stride, gradients + r * logits_stride);
    }

    const auto [probs, grads, grad_rows, out_gradient_groups, query_groups] =
        operands(count, key_depth, scale, query_rows, out_gradient_rows);
    // P^T and dS^T are read in place: the next row is the next group.
    matmul<E, true>({probs, kGroup<E>, group_stride}, {out_gradient_groups, value_width * kGroup<E>, panel_stride},
                    seen.end, value_width, depth, value_gradient, value_width);  // [keys, dv]
    matmul<E, true>({grads, kGroup<E>, group_stride}, {query_groups, query_width * kGroup<E>, panel_stride}, seen.end,
                    query_width, depth, key_gradient, query_width);  // [keys, d]
    matmul<E, true>({grad_rows, logits_stride, kGroup<E>}, {key_groups, query_width * kGroup<E>, panel_stride}, count,
                    query_width, key_depth, query_gradient(split, rows.begin), query_width);  // [count, d]
  }

  // What the last three products multiply.
  struct Operands {
    const E *probs, *grads;  // P, scale * dS as groups of rows: [count / kGroup, group_stride]
    const E* grad_rows;      // dS: [count, logits_stride]
    const E *out_gradient_groups, *query_groups;
  };

  // Where operands are not of the type of the arithmetic: P and dS rounded and in groups, over what they were.
  Operands operands(int64_t count, int64_t columns, T scale, const S* query_rows, const S* out_gradient_rows) {
    if constexpr (kGroup<E> == 1) {
      return {logits, gradients, gradients, out_gradient, queries};  // the queries hold the scale
    } else {
      const auto row_of = [&](T* rows, int64_t r) { return r < count ? rows + r * logits_stride : nullptr; };
      for (int64_t r = 0; r < padded_depth<E>(count); r += 2) {
        const T *first = row_of(gradients, r), *second = row_of(gradients, r + 1);
        if (first) narrow_row(first, columns, gradient_rows + r * logits_stride);
        if (second) narrow_row(second, columns, gradient_rows + (r + 1) * logits_stride);
        narrow_groups(first, second, columns, scale, gradients + r * logits_stride);
        narrow_groups(row_of(logits, r), row_of(logits, r + 1), columns, T(1), logits + r * logits_stride);
      }
      pack_groups(query_rows, p.query.token_stride, count, p.head_dim, query_pairs, query_width);
      pack_groups(out_gradient_rows, p.grad_out.token_stride, count, p.value_dim, out_gradient_pairs, value_width);
      return {reinterpret_cast<E*>(logits), reinterpret_cast<E*>(gradients), gradient_rows, out_gradient_pairs,
              query_pairs};
    }
  }

  // S, dP -> P, dS of one row, in place; gradients of the score terms on the way.
  void differentiate_row(int64_t query, Range visible, int64_t width, int64_t first_key, T scale, T* logits_row,
                         T* gradient_row) const {
    const int64_t row = (sequence.first_row + query) * p.heads + head;
    const T lse = static_cast<const T*>(p.lse)[row];
    // delta = dO.O - dlse, so that dS = P * (dP - delta).
    const int64_t token = sequence.first_query + query;
    T delta =
        dot_rows<T>(p.out.at<const S>(batch, token, head), p.grad_out.at<const S>(batch, token, head), p.value_dim);
    if (p.grad_lse) delta -= static_cast<const T*>(p.grad_lse)[row];
    // An empty row (lse = -inf) has P = 0: exp(-inf).
    const T offset = lse == kMinusInfinity<T> ? -kMinusInfinity<T> : lse;

    if (p.score.has_terms()) {
      differentiate_terms(query, visible, first_key, scale, offset, delta, logits_row, gradient_row);
    } else {
      for_each_vector<T>(visible, [&](int64_t c, Range lanes) {
        const Vec<T> prob = keep(exp<T>(load(logits_row + c) * scale - offset), lanes, T(0));
        store(logits_row + c, prob);
        store(gradient_row + c, keep(prob * (load(gradient_row + c) - delta), lanes, T(0)));
      });
    }
    const Range columns = visible.empty() ? Range{0, 0} : visible;
    clear(logits_row, {0, columns.begin}), clear(logits_row, {columns.end, width});
    clear(gradient_row, {0, columns.begin}), clear(gradient_row, {columns.end, width});
  }

  void differentiate_terms(int64_t query, Range visible, int64_t first_key, T scale, T offset, T delta, T* logits_row,
                           T* gradient_row) const {
    const ScoreRow<T> score(p.score, batch, head, query, first_key);
    const TermGradRow<T> multiplier(p.score.multiplier, batch, head, query, first_key);
    const TermGradRow<T> bias(p.score.bias, batch, head, query, first_key);
    const TermGradRow<T> key_bias(p.score.key_bias, batch, head, query, first_key);
    for_each_vector<T>(visible, [&](int64_t c, Range lanes) {
      const Vec<T> product = load(logits_row + c) * scale;
      const Vec<T> x = score.apply(product, c, lanes);
      const Vec<T> prob = keep(exp<T>(x - offset), lanes, T(0));
      const Vec<T> grad = prob * (load(gradient_row + c) - delta);
      multiplier.add(grad * product, c, lanes);
      bias.add(grad, c, lanes);
      key_bias.add(grad, c, lanes);
      store(logits_row + c, prob);
      store(gradient_row + c, keep(grad * score.multiplier.at(c, lanes), lanes, T(0)));
    });
  }

  T* query_gradient(int64_t of_split, int64_t query) const {
    const int64_t row = (of_split * p.heads + head) * p.num_rows() + sequence.first_row + query;
    return static_cast<T*>(p.grad_query_parts) + row * query_width;
  }

  const AttentionBackwardParams& p;
  Scratch scratch;
  const int64_t most_keys = std::min(round_up(p.num_keys(), kTileAlignment), kBackwardKeyTile);
  const int64_t query_width = round_up(p.head_dim, kWidth<T>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  const int64_t logits_stride = (most_keys / kWidth<T> | 1) * kWidth<T>;

  const int64_t operand_width = round_up(p.head_dim, kOperandWidth<E>);
  const int64_t out_gradient_width = round_up(p.value_dim, kOperandWidth<E>);
  const int64_t group_stride = logits_stride * kGroup<E> * (sizeof(T) / sizeof(E));  // of P and dS
  static constexpr int64_t panel_stride = kPanel<E> * kGroup<E>;

  static constexpr int64_t block_rows = padded_depth<E>(kBackwardQueryBlock);

  E* queries = scratch.take<E>(block_rows * operand_width);
  E* out_gradient = scratch.take<E>(block_rows * out_gradient_width);
  T* logits = scratch.take<T>(block_rows * logits_stride);     // then P
  T* gradients = scratch.take<T>(block_rows * logits_stride);  // dP, then dS
  KeyTile<E> key_tile{scratch.take<E>(most_keys * padded_depth<E>(p.head_dim)),
                      scratch.take<E>(kMostLastKeys* operand_width), p.head_dim, operand_width};
  E* value_panels = scratch.take<E>(most_keys * padded_depth<E>(p.value_dim));
  E* key_groups = scratch.take<E>(most_keys * query_width);
  T* key_gradient = scratch.take<T>(most_keys * query_width);
  T* value_gradient = scratch.take<T>(most_keys * value_width);
  // Only where operands are pairs.
  static constexpr int64_t kPairRows = kGroup<E> == 1 ? 0 : block_rows;
  E* gradient_rows = scratch.take<E>(kPairRows * logits_stride);
  E* query_pairs = scratch.take<E>(kPairRows * query_width);
  E* out_gradient_pairs = scratch.take<E>(kPairRows * value_width);

  int64_t batch = 0, head = 0, kv_head = 0, split = 0;
  Sequence sequence;
  Axis axis;
  Tiling keys{};
};

}  // namespace

int64_t attention_backward_scratch(const AttentionBackwardParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = Backward<S>(params, nullptr).scratch_size(); });
  return size;
}

int64_t attention_backward_parts(const AttentionBackwardParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = Backward<S>(params, nullptr).parts_size(); });
  return size;
}

void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end, void* scratch) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { Backward<S>(params, scratch).run(begin, end); });
}

void finish_query_gradient(const AttentionBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { Backward<S>(params, nullptr).finish(begin, end); });
}

}  // namespace vitkernels::VK_ISA
