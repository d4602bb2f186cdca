// Backward of softmax attention on the CPU. Compiled once per instruction set.
//
// A task is a range of keys (a split) of a group of heads that share a gradient. It owns their key and value gradients
// and these keys' columns of the bias gradients; sums over batch and heads run inside it, in order. Every key contributes
// to a table by offset, so each task adds to a partial sum of its own.

#include "attention/cpu/backward_tile.h"
#include "attention/cpu/differentiate.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Backward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Backward(const AttentionBackwardParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  int64_t parts_size() const { return params.splits * p.heads * forward.num_rows() * query_width * int64_t(sizeof(T)); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for_each_key_tile(params, begin, end, [&](const KeyTileTask& task) {
      batch = task.batch, kv_head = task.kv_head, split = task.split, part = task.part;
      start_sequence();
      tile_of_keys(task.tile);
    });
  }

  // dQ of some (batch, head) pairs: adds the splits' partial sums in order, and applies the scale.
  void finish(int64_t begin, int64_t end) {
    const int64_t part_size = p.heads * forward.num_rows() * query_width;
    for (int64_t pair = begin; pair < end; ++pair) {
      batch = pair / p.heads, head = pair % p.heads;
      start_sequence();
      if (!params.grad_query_parts) {
        if (axis.num_keys == 0) clear_query_gradients({0, axis.num_queries});
        continue;
      }
      for (int64_t query = 0; query < axis.num_queries; ++query) {
        T* sum = query_gradient(0, query, params.grad_query_parts);
        sum_splits(sum, query_width, params.splits, part_size);
        T* relative = nullptr;
        if (params.grad_rel_query_parts) {
          relative = query_gradient(0, query, params.grad_rel_query_parts);
          sum_splits(relative, query_width, params.splits, part_size);
        }
        finish_query(query, sum, relative);
      }
    }
  }

 private:
  void start_sequence() {
    sequence = forward.sequence(batch);
    axis = sequence.axis;
  }

  // Stores dQ of one query: the scale applies to the products alone, not to the relative logits.
  void finish_query(int64_t query, T* sum, const T* relative) const {
    const int64_t token = sequence.first_query + query;
    if (params.query_dot) {
      static_cast<T*>(params.query_dot)[head * forward.num_rows() + sequence.first_row + query] =
          dot_rows<T>(p.query.at<const S>(batch, token, head), sum, p.head_dim);
    }
    T scale = p.score.scale_of<T>(head);
    if (relative) {
      for (int64_t c = 0; c < query_width; c += kWidth<T>) store(sum + c, load(sum + c) * scale + load(relative + c));
      scale = T(1);
    }
    unpack_rows<T>(sum, query_width, 1, p.head_dim, scale, params.grad_query.at<S>(batch, token, head), 0);
  }

  // Of queries that see no key.
  void clear_query_gradients(Range queries) const {
    for (int64_t query = queries.begin; query < queries.end; ++query) {
      const int64_t token = sequence.first_query + query, row = head * forward.num_rows() + sequence.first_row + query;
      if (params.query_dot) static_cast<T*>(params.query_dot)[row] = T(0);
      std::fill_n(params.grad_query.at<S>(batch, token, head), p.head_dim, S{});
    }
  }

  void tile_of_keys(Range tile) {
    const int64_t count = tile.end - tile.begin, first = sequence.first_key + tile.begin;
    key_tile.pack({p.key.at<const S>(batch, first, kv_head), p.key.token_stride},
                  {p.value.at<const S>(batch, first, kv_head), p.value.token_stride}, count);

    const int64_t blocks = divide_up(axis.num_queries, kBackwardQueryBlock);
    for (int64_t i = forward.groups.first_head[kv_head]; i < forward.groups.first_head[kv_head + 1]; ++i) {
      head = forward.groups.head_list[i];
      const bool is_last_head = i + 1 == forward.groups.first_head[kv_head + 1];
      for (int64_t block = 0; block < blocks; ++block) {
        is_last_block = is_last_head && block + 1 == blocks;
        block_of_queries({axis.num_queries * block / blocks, axis.num_queries * (block + 1) / blocks}, tile);
      }
    }
    unpack_rows<T>(key_tile.key_gradient, query_width, count, p.head_dim, T(1),
                   params.grad_key.at<S>(batch, first, kv_head), params.grad_key.token_stride);
    unpack_rows<T>(key_tile.value_gradient, key_tile.value_width, count, p.value_dim, T(1),
                   params.grad_value.at<S>(batch, first, kv_head), params.grad_value.token_stride);
  }

  void block_of_queries(Range rows, Range tile) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile), tile.begin);
    if (seen.empty()) {
      if (stores_query_gradient) clear_query_gradients(rows);
      return;
    }
    const int64_t first = sequence.first_query + rows.begin;
    const EvenRows queries{p.query.at<const S>(batch, first, head), p.query.token_stride};
    const EvenRows out_gradient{params.grad_out.at<const S>(batch, first, head), params.grad_out.token_stride};
    if (p.score.by_offset.any()) {
      offset_row.start_block(head, rows, tile);
      offset_row.start_rows(queries, rows, tile);
    }
    const T scale = p.score.scale_of<T>(head);
    T* sums = stores_query_gradient ? query_sums : query_gradient(split, rows.begin, params.grad_query_parts);
    key_tile.add(
        {queries, out_gradient, rows.end - rows.begin, sums, stores_query_gradient}, {0, seen.end}, scale,
        [&](int64_t r, int64_t, int64_t width, T* logits, T* gradients) VK_BODY {
          const int64_t query = rows.begin + r;
          const Range visible = relative_to(intersect(axis.keys(query), tile), tile.begin);
          differentiate_row(p.score, {batch, head, query, tile.begin, visible, width},
                            numbers_of_row(query, kFoldsScale<E> ? T(1) : scale), logits, gradients, &offset_row, part);
        },
        [&](int turn) VK_BODY { prefetch(rows, tile, turn); });
    if (stores_query_gradient) {
      for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
        finish_query(rows.begin + r, query_sums + r * query_width, nullptr);
      }
    }
    if (params.grad_rel_query_parts) {
      offset_row.finish_rows(part, rows, query_gradient(split, rows.begin, params.grad_rel_query_parts), query_width);
    }
  }

  // Within a head: the next block of queries, or at the end of a tile of keys its gradients and the next tile.
  VK_INLINE void prefetch(Range rows, Range tile, int turn) const {
    constexpr int kTurns = 8;
    if (is_last_block) {
      const int64_t count = tile.end - tile.begin, first = sequence.first_key + tile.begin;
      const EvenRows keys{p.key.at<const S>(batch, first + count, kv_head), p.key.token_stride};
      const EvenRows values{p.value.at<const S>(batch, first + count, kv_head), p.value.token_stride};
      const EvenRows<S> key_gradients{params.grad_key.at<S>(batch, first, kv_head), params.grad_key.token_stride};
      const EvenRows<S> value_gradients{params.grad_value.at<S>(batch, first, kv_head), params.grad_value.token_stride};
      const Range share = share_of({0, count}, turn, kTurns);
      for (int64_t i = share.begin; i < share.end; ++i) {
        prefetch_row<true>(key_gradients[i], p.head_dim);
        prefetch_row<true>(value_gradients[i], p.value_dim);
        prefetch_row(keys[i], p.head_dim);
        prefetch_row(values[i], p.value_dim);
      }
    } else {
      const int64_t count = rows.end - rows.begin, first = sequence.first_query + rows.end;
      const EvenRows queries{p.query.at<const S>(batch, first, head), p.query.token_stride};
      const EvenRows outputs{forward.out.at<const S>(batch, first, head), forward.out.token_stride};
      const EvenRows out_gradients{params.grad_out.at<const S>(batch, first, head), params.grad_out.token_stride};
      const EvenRows<S> query_gradients{params.grad_query.at<S>(batch, first, head), params.grad_query.token_stride};
      const Range share = share_of({0, count}, turn, kTurns);
      for (int64_t i = share.begin; i < share.end; ++i) {
        prefetch_row(queries[i], p.head_dim);
        prefetch_row(outputs[i], p.value_dim);
        prefetch_row(out_gradients[i], p.value_dim);
        if (stores_query_gradient) prefetch_row<true>(query_gradients[i], p.head_dim);
      }
    }
  }

  VK_INLINE RowNumbers<T> numbers_of_row(int64_t query, T scale) const {
    const int64_t token = sequence.first_query + query, row = (sequence.first_row + query) * p.heads + head;
    // delta = dO.O - dlse, so that dS = P * (dP - delta).
    T delta = dot_rows<T>(forward.out.at<const S>(batch, token, head), params.grad_out.at<const S>(batch, token, head),
                          p.value_dim);
    if (params.grad_lse) delta -= static_cast<const T*>(params.grad_lse)[row];
    return {scale, exponent_offset(static_cast<const T*>(forward.lse)[row]), delta};
  }

  T* query_gradient(int64_t of_split, int64_t query, void* parts) const {
    const int64_t row = (of_split * p.heads + head) * forward.num_rows() + sequence.first_row + query;
    return static_cast<T*>(parts) + row * query_width;
  }

  const AttentionBackwardParams& params;
  const AttentionParams& forward = params.forward;
  const Problem& p = forward.problem;
  Scratch scratch;
  const int64_t max_keys = std::min(round_up(p.num_keys(), kTileAlignment), kBackwardKeyTile);

  BackwardTile<S> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t query_width = key_tile.query_width;
  const bool stores_query_gradient = !params.grad_query_parts;
  T* query_sums = scratch.take<T>(stores_query_gradient ? kBackwardQueryBlock * query_width : 0);
  OffsetRow<T> offset_row{p.score, {p.head_dim, kBackwardQueryBlock, kBackwardQueryBlock, max_keys, true}, scratch};

  int64_t batch = 0, head = 0, kv_head = 0, split = 0, part = 0;
  bool is_last_block = false;  // of queries that see the tile
  Sequence sequence;
  Axis axis;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Backward, AttentionBackwardParams);
