// Backward of softmax attention on the CPU. Compiled once per instruction set.
//
// Five products per tile of keys and block of queries:
//   S = Q K^T, dP = dO V^T, then with P = exp(S - lse) and dS = P * (dP - delta):
//   dV += P^T dO, dK += dS^T Q, dQ += dS K.
// A task is a range of keys (a split) of a group of heads that share a gradient. It alone writes their key and value
// gradients and these keys' columns of the bias gradients; sums over batch and heads run inside it, in order. To a
// table by offset, all keys contribute: a task has a part of that gradient to itself.

#include "attention/differentiate_cpu.h"
#include "attention/logits_cpu.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Backward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Backward(const AttentionBackwardParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const { return p.splits * p.heads * p.num_rows() * query_width * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for_each_key_tile(p, begin, end, [&](const KeyTileTask& task) {
      batch = task.batch, kv_head = task.kv_head, split = task.split, part = task.part;
      start_sequence();
      tile_of_keys(task.tile);
    });
  }

  // dQ of some (batch, head) pairs: the splits' parts, added in order, times the scale where the query had it.
  void finish(int64_t begin, int64_t end) {
    const int64_t part_size = p.heads * p.num_rows() * query_width;
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      start_sequence();
      for (int64_t query = 0; query < axis.num_queries; ++query) {
        const int64_t token = sequence.first_query + query;
        T* sum = query_gradient(0, query, p.grad_query_parts);
        sum_splits(sum, query_width, p.splits, part_size);
        if (p.query_dot) {
          static_cast<T*>(p.query_dot)[head * p.num_rows() + sequence.first_row + query] =
              dot_rows<T>(p.query.at<const S>(batch, token, head), sum, p.head_dim);
        }
        T scale = p.score.scale_of<T>(head);
        if (p.grad_rel_query_parts) {
          T* relative = query_gradient(0, query, p.grad_rel_query_parts);
          sum_splits(relative, query_width, p.splits, part_size);
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
  void start_sequence() {
    sequence = p.sequence(batch);
    axis = sequence.axis;
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
    key_tile.multiply(queries, count, {0, seen.end}, logits, logits_stride);  // [count, seen]
    matmul<E, false>({out_gradient, out_gradient_width, kGroup<E>},
                     {value_panels, kPanel<E> * kGroup<E>, padded_depth<E>(p.value_dim) * kPanel<E>}, count, width,
                     padded_depth<E>(p.value_dim), gradients, logits_stride);  // [count, width]

    if (p.score.on_grid.any()) {
      grid_row.start_block(head, rows, tile);
      grid_row.start_rows(query_rows, p.query.token_stride, rows, tile);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
      const int64_t token = sequence.first_query + query, row = (sequence.first_row + query) * p.heads + head;
      // delta = dO.O - dlse, so that dS = P * (dP - delta).
      T delta =
          dot_rows<T>(p.out.at<const S>(batch, token, head), p.grad_out.at<const S>(batch, token, head), p.value_dim);
      if (p.grad_lse) delta -= static_cast<const T*>(p.grad_lse)[row];
      differentiate_row(
          p.score, {batch, head, query, tile.begin, visible, key_depth},
          RowNumbers<T>{kFoldsScale<E> ? T(1) : scale, exponent_offset(static_cast<const T*>(p.lse)[row]), delta},
          logits + r * logits_stride, gradients + r * logits_stride, &grid_row, part);
    }

    const auto [probs, grads, grad_rows, out_gradient_groups, query_groups] =
        operands(count, key_depth, scale, query_rows, out_gradient_rows);
    // P^T and dS^T are read in place: the next row is the next group.
    matmul<E, true>({probs, kGroup<E>, group_stride}, {out_gradient_groups, value_width * kGroup<E>, panel_stride},
                    seen.end, value_width, depth, value_gradient, value_width);  // [keys, dv]
    matmul<E, true>({grads, kGroup<E>, group_stride}, {query_groups, query_width * kGroup<E>, panel_stride}, seen.end,
                    query_width, depth, key_gradient, query_width);  // [keys, d]
    matmul<E, true>({grad_rows, logits_stride, kGroup<E>}, {key_groups, query_width * kGroup<E>, panel_stride}, count,
                    query_width, key_depth, query_gradient(split, rows.begin, p.grad_query_parts),
                    query_width);  // [count, d]
    if (p.grad_rel_query_parts) {
      grid_row.finish_rows(part, rows, query_gradient(split, rows.begin, p.grad_rel_query_parts), query_width);
    }
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
  GridRow<T> grid_row{p.score, {p.head_dim, kBackwardQueryBlock, kBackwardQueryBlock, most_keys, true}, scratch};

  int64_t batch = 0, head = 0, kv_head = 0, split = 0, part = 0;
  Sequence sequence;
  Axis axis;
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
