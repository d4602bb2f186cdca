// Backward of softmax attention on the CPU. Compiled once per instruction set.
//
// Five products per tile of keys and block of queries:
//   S = Q K^T, dP = dO V^T, then with P = exp(S - lse) and dS = P * (dP - delta):
//   dV += P^T dO, dK += dS^T Q, dQ += dS K.
// A task is a range of keys (a split) of a group of heads that share a gradient. It alone writes their key and value
// gradients and these keys' columns of the bias gradients; sums over batch and heads run inside it, in order. To a
// table by offset, all keys contribute: a task has a part of that gradient to itself.

#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/grid_cpu.h"
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

// The gradients of all terms but those of the grid along one row.
template <class T>
struct ScoreGradRow {
  TermGradRow<T> multiplier, bias, key_bias;

  ScoreGradRow(const Score& s, int64_t batch, int64_t head, int64_t query, int64_t first_key)
      : multiplier(s.multiplier, batch, head, query, first_key),
        bias(s.bias, batch, head, query, first_key),
        key_bias(s.key_bias, batch, head, query, first_key) {}

  VK_INLINE void add(Vec<T> grad, Vec<T> product, int64_t column, Range lanes) const {
    multiplier.add(grad * product, column, lanes);
    bias.add(grad, column, lanes);
    key_bias.add(grad, column, lanes);
  }
};

template <class S>
class Backward {
  using T = Compute<S>;

 public:
  Backward(const AttentionBackwardParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const { return p.splits * p.heads * p.num_rows() * query_width * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      split = task % p.splits;
      const int64_t head_group = task / p.splits % p.head_groups();
      const int64_t batch_group = task / p.splits / p.head_groups();
      const int64_t batch_groups = p.batch_groups();
      const Range batches{p.batch * batch_group / batch_groups, p.batch * (batch_group + 1) / batch_groups};
      part = batch_group * p.splits + split;
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

  // dQ of some (batch, head) pairs: the splits' parts, added in order, times the scale where the query had it.
  void finish(int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      start_sequence();
      for (int64_t query = 0; query < axis.num_queries; ++query) {
        const int64_t token = sequence.first_query + query;
        T* sum = sum_of_splits(query, p.grad_query_parts);
        if (p.query_dot) {
          static_cast<T*>(p.query_dot)[head * p.num_rows() + sequence.first_row + query] =
              dot_with_tensor(p.query.at<const S>(batch, token, head), sum, p.head_dim);
        }
        T scale = p.score.scale_of<T>(head);
        if (p.grad_rel_query_parts) {
          const T* relative = sum_of_splits(query, p.grad_rel_query_parts);
          for (int64_t c = 0; c < query_width; c += kWidth<T>) {
            store(sum + c, load(sum + c) * scale + load(relative + c));
          }
          scale = T(1);
        }
        unpack_rows<T>(sum, query_width, 1, p.head_dim, scale, p.grad_query.at<S>(batch, token, head),
                       p.grad_query.token_stride);
      }
    }
  }

 private:
  T* sum_of_splits(int64_t query, void* parts) const {
    T* sum = query_gradient(0, query, parts);
    for (int64_t s = 1; s < p.splits; ++s) {
      const T* added = query_gradient(s, query, parts);
      for (int64_t c = 0; c < query_width; c += kWidth<T>) store(sum + c, load(sum + c) + load(added + c));
    }
    return sum;
  }

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
    pack_transposed<T>(value_rows, p.value.token_stride, count, p.value_dim, value_panels);
    pack_rows<T>(key_rows, p.key.token_stride, count, p.head_dim, T(1), key_copy, query_width);
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
    const int64_t count = rows.end - rows.begin;
    const int64_t width = round_up(seen.end, kWidth<T>);

    pack_rows<T>(p.query.at<const S>(batch, sequence.first_query + rows.begin, head), p.query.token_stride, count,
                 p.head_dim, p.score.scale_of<T>(head), queries, query_width);  // [count, d]
    pack_rows<T>(p.grad_out.at<const S>(batch, sequence.first_query + rows.begin, head), p.grad_out.token_stride, count,
                 p.value_dim, T(1), out_gradient, value_width);          // [count, dv]
    key_tile.multiply(queries, count, seen.end, logits, logits_stride);  // [count, seen]
    matmul<T, false>({out_gradient, value_width, 1}, {value_panels, kPanel<T>, p.value_dim * kPanel<T>}, count, width,
                     p.value_dim, gradients, logits_stride);  // [count, width]

    if (p.score.on_grid.any()) {
      grid_row.start_block(head, rows, tile);
      grid_row.start_rows(p.query.at<const S>(batch, rows.begin, head), p.query.token_stride, rows, tile);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      differentiate_row(query, visible, seen.end, tile.begin, out_gradient + r * value_width,
                        logits + r * logits_stride, gradients + r * logits_stride);
    }

    // P^T and dS^T are read in place: a column stride of one.
    matmul<T, true>({logits, 1, logits_stride}, {out_gradient, value_width, kPanel<T>}, seen.end, value_width, count,
                    value_gradient, value_width);  // [keys, dv]
    matmul<T, true>({gradients, 1, logits_stride}, {queries, query_width, kPanel<T>}, seen.end, query_width, count,
                    key_gradient, query_width);  // [keys, d]
    matmul<T, true>({gradients, logits_stride, 1}, {key_copy, query_width, kPanel<T>}, count, query_width, seen.end,
                    query_gradient(split, rows.begin), query_width);  // [count, d]
    if (p.grad_rel_query_parts) {
      grid_row.finish_rows(part, rows, query_gradient(split, rows.begin, p.grad_rel_query_parts), query_width);
    }
  }

  // S, dP -> P, dS of one row, in place; gradients of the score terms on the way.
  void differentiate_row(int64_t query, Range visible, int64_t width, int64_t first_key, const T* grad_out,
                         T* logits_row, T* gradient_row) {
    const int64_t row = (sequence.first_row + query) * p.heads + head;
    const T lse = static_cast<const T*>(p.lse)[row];
    // delta = dO.O - dlse, so that dS = P * (dP - delta).
    T delta = dot_with_tensor(p.out.at<const S>(batch, sequence.first_query + query, head), grad_out, p.value_dim);
    if (p.grad_lse) delta -= static_cast<const T*>(p.grad_lse)[row];
    // An empty row (lse = -inf) has P = 0: exp(-inf).
    const T offset = lse == kMinusInfinity<T> ? -kMinusInfinity<T> : lse;

    if (p.score.has_terms()) {
      differentiate_terms(query, visible, first_key, offset, delta, logits_row, gradient_row);
    } else {
      for_each_vector<T>(visible, [&](int64_t c, Range lanes) VK_BODY {
        const Vec<T> prob = keep(exp<T>(load(logits_row + c) - offset), lanes, T(0));
        store(logits_row + c, prob);
        store(gradient_row + c, keep(prob * (load(gradient_row + c) - delta), lanes, T(0)));
      });
    }
    const Range columns = visible.empty() ? Range{0, 0} : visible;
    clear(logits_row, {0, columns.begin}), clear(logits_row, {columns.end, width});
    clear(gradient_row, {0, columns.begin}), clear(gradient_row, {columns.end, width});
  }

  VK_WHOLE void differentiate_terms(int64_t query, Range visible, int64_t first_key, T offset, T delta, T* logits_row,
                                    T* gradient_row) {
    const ScoreGradRow<T> gradients(p.score, batch, head, query, first_key);
    if (!p.score.on_grid.any()) {
      const ScoreRow<T> score(p.score, batch, head, query, first_key);
      differentiate_score(score, visible, offset, delta, logits_row, gradient_row,
                          [&](auto... at) { gradients.add(at...); });
      return;
    }
    const GridScoreRow<T> score = grid_row.expand(batch, query, first_key, visible);
    differentiate_score(score, visible, offset, delta, logits_row, gradient_row,
                        [&](Vec<T> grad, Vec<T> product, int64_t c, Range lanes) {
                          gradients.add(grad, product * score.multiplier.at(c, lanes), c, lanes);
                          grid_row.set_gradient(score, grad, product, c, lanes);
                        });
    grid_row.add_gradient(part);
  }

  // Calls add_gradient(grad, product, column, lanes) with every vector of dS.
  template <class Row, class Function>
  VK_INLINE void differentiate_score(const Row& score, Range visible, T offset, T delta, T* logits_row, T* gradient_row,
                                     Function&& add_gradient) const {
    for_each_vector<T>(visible, [&](int64_t c, Range lanes) {
      const Vec<T> product = load(logits_row + c);
      const Vec<T> x = score.apply(product, c, lanes);
      const Vec<T> prob = keep(exp<T>(x - offset), lanes, T(0));
      const Vec<T> grad = prob * (load(gradient_row + c) - delta);
      add_gradient(grad, product, c, lanes);
      store(logits_row + c, prob);
      store(gradient_row + c, keep(grad * score.factor(c, lanes), lanes, T(0)));
    });
  }

  // The product of a tensor's row with a padded row of ours.
  T dot_with_tensor(const S* a, const T* b, int64_t count) const {
    Vec<T> sum{};
    for_each_vector<T>({0, count},
                       [&](int64_t c, Range lanes) { sum += load_widened<T>(a + c, lanes.end) * load(b + c); });
    return reduce_add<T>(sum);
  }

  T* query_gradient(int64_t of_split, int64_t query) const {
    return query_gradient(of_split, query, p.grad_query_parts);
  }
  T* query_gradient(int64_t of_split, int64_t query, void* parts) const {
    const int64_t row = (of_split * p.heads + head) * p.num_rows() + sequence.first_row + query;
    return static_cast<T*>(parts) + row * query_width;
  }

  const AttentionBackwardParams& p;
  Scratch scratch;
  const int64_t most_keys = std::min(round_up(p.num_keys(), kTileAlignment), kBackwardKeyTile);
  const int64_t query_width = round_up(p.head_dim, kWidth<T>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  const int64_t logits_stride = (most_keys / kWidth<T> | 1) * kWidth<T>;

  T* queries = scratch.take<T>(kBackwardQueryBlock * query_width);
  T* out_gradient = scratch.take<T>(kBackwardQueryBlock * value_width);
  T* logits = scratch.take<T>(kBackwardQueryBlock * logits_stride);     // then P
  T* gradients = scratch.take<T>(kBackwardQueryBlock * logits_stride);  // dP, then dS
  KeyTile<T> key_tile{scratch.take<T>(most_keys * p.head_dim), scratch.take<T>(kMostLastKeys* query_width), p.head_dim,
                      query_width};
  T* value_panels = scratch.take<T>(most_keys * p.value_dim);
  T* key_copy = scratch.take<T>(most_keys * query_width);
  T* key_gradient = scratch.take<T>(most_keys * query_width);
  T* value_gradient = scratch.take<T>(most_keys * value_width);
  GridRow<T> grid_row{p.score, {p.head_dim, kBackwardQueryBlock, kBackwardQueryBlock, most_keys, true}, scratch};

  int64_t batch = 0, head = 0, kv_head = 0, split = 0, part = 0;
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
