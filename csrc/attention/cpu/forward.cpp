// Forward of softmax attention on the CPU. Compiled once per instruction set.
//
// A task is a query tile of one head. KV tiles are packed once per head while a thread stays with it; up to
// kForwardKeyTile keys are a single tile, whose softmax needs no rescaling.

#include <cmath>
#include <limits>

#include "attention/cpu/forward_tile.h"
#include "attention/cpu/offset_grid.h"
#include "attention/cpu/tile_sizes.h"
#include "attention/dense.h"
#include "cpu/make_kernel.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Forward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Forward(const AttentionParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    batch = params.packing.first_task
                ? std::upper_bound(params.packing.first_task, params.packing.first_task + p.batch + 1, begin) -
                      params.packing.first_task - 1
                : begin / tasks_per_batch;
    start_sequence();
    for (int64_t task = begin; task < end; ++task) {
      if (task >= first_task(batch + 1)) {
        do ++batch;
        while (task >= first_task(batch + 1));
        start_sequence();
      }
      const int64_t blocks = forward_query_blocks(axis), index = task - first_task(batch), count = axis.num_queries;
      head = index / blocks;
      const int64_t block = index % blocks;
      block_of_queries({count * block / blocks, count * (block + 1) / blocks});
    }
  }

 private:
  int64_t first_task(int64_t of_batch) const {
    return params.packing.first_task ? params.packing.first_task[of_batch] : of_batch * tasks_per_batch;
  }

  void start_sequence() {
    sequence = params.sequence(batch);
    axis = sequence.axis;
    keys = forward_keys(axis);
    packed_head = -1;
  }

  void block_of_queries(Range rows) {
    const int64_t count = rows.end - rows.begin;
    std::fill_n(states, count, RowState<T>{});
    if (keys.count != 1) std::fill_n(acc, count * value_width, T(0));
    for (int64_t tile = 0; tile < keys.count; ++tile) {
      const Range tile_keys{tile * keys.size, std::min((tile + 1) * keys.size, axis.num_keys)};
      if (intersect(axis.any_keys(rows), tile_keys).empty()) continue;
      pack(tile, tile_keys);
      if (p.score.by_offset.any()) offset_row.start_block(head, rows, tile_keys);
      const int64_t groups = divide_up(count, kRowGroup<E>);
      for (int64_t group = 0; group < groups; ++group) {
        group_of_rows(rows, {rows.begin + count * group / groups, rows.begin + count * (group + 1) / groups},
                      tile_keys);
      }
    }
    finish(rows);
  }

  void pack(int64_t tile, Range tile_keys) {
    const int64_t kv_head = head_of_keys();
    if (packed_head == kv_head && packed_tile == tile) return;
    packed_head = kv_head, packed_tile = tile;
    const int64_t first = sequence.first_key + tile_keys.begin;
    const int64_t count = tile_keys.end - tile_keys.begin;
    key_tile.pack({p.key.at<const S>(batch, first, kv_head), p.key.token_stride},
                  {p.value.at<const S>(batch, first, kv_head), p.value.token_stride}, count);
  }

  // Adds one KV tile to the accumulators of the queries `rows`, a part of `block`.
  void group_of_rows(Range block, Range rows, Range tile_keys) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile_keys), tile_keys.begin);
    if (seen.empty()) return;
    const EvenRows queries{p.query.at<const S>(batch, sequence.first_query + rows.begin, head), p.query.token_stride};
    if (p.score.by_offset.any()) offset_row.start_rows(queries, rows, tile_keys);
    const int64_t first_row = rows.begin - block.begin, count = rows.end - rows.begin;
    const ScoreTerm& bias = p.score.bias;
    const T* of_rows =
        is_bias ? static_cast<const T*>(bias.data) + bias.strides.offset(batch, head, rows.begin, tile_keys.begin)
                : nullptr;
    key_tile.add(
        {queries, count, acc + first_row * value_width, states + first_row, keys.count == 1, of_rows,
         bias.strides.query, false},
        {0, seen.end}, p.score.scale_of<T>(head), p.score.has_terms(),
        [&](int64_t r)
            VK_BODY { return relative_to(intersect(axis.keys(rows.begin + r), tile_keys), tile_keys.begin); },
        [&](T* row, int64_t r, Range visible, int64_t, T scale)
            VK_BODY { return apply_terms(row, visible, scale, rows.begin + r, tile_keys.begin); },
        [&](int turn) VK_BODY { prefetch(block, rows, tile_keys, turn); });
  }

  // Within a head. With a single tile of keys: the next queries, and where these rows' results go. With several, each group
  // of rows takes its share of the next tile.
  VK_INLINE void prefetch(Range block, Range rows, Range tile_keys, int turn) const {
    constexpr int kTurns = 4;
    const int64_t count = rows.end - rows.begin;
    if (keys.count == 1) {
      const int64_t first = sequence.first_query + rows.begin;
      const EvenRows queries{p.query.at<const S>(batch, first + count, head), p.query.token_stride};
      const EvenRows<S> outputs{params.out.at<S>(batch, first, head), params.out.token_stride};
      const Range share = share_of({0, count}, turn, kTurns);
      for (int64_t i = share.begin; i < share.end; ++i) {
        prefetch_row(queries[i], p.head_dim);
        prefetch_row<true>(outputs[i], p.value_dim);
      }
      return;
    }
    const int64_t first = sequence.first_key + tile_keys.end, kv_head = head_of_keys();
    const EvenRows next_keys{p.key.at<const S>(batch, first, kv_head), p.key.token_stride};
    const EvenRows next_values{p.value.at<const S>(batch, first, kv_head), p.value.token_stride};
    const Range of_group{keys.size * (rows.begin - block.begin) / (block.end - block.begin),
                         keys.size * (rows.end - block.begin) / (block.end - block.begin)};
    const Range share = share_of(of_group, turn, kTurns);
    for (int64_t i = share.begin; i < share.end; ++i) {
      prefetch_row(next_keys[i], p.head_dim);
      prefetch_row(next_values[i], p.value_dim);
    }
  }

  int64_t head_of_keys() const { return params.groups.kv_head_of[head]; }

  T apply_terms(T* row, Range visible, T scale, int64_t query, int64_t first_key) {
    if (p.score.by_offset.any()) {
      return apply_score(row, visible, scale, offset_row.expand(batch, query, first_key, visible));
    }
    return apply_score(row, visible, scale, ScoreRow<T>(p.score, batch, head, query, first_key));
  }

  void finish(Range rows) {
    const int64_t count = rows.end - rows.begin;
    finish_rows(states, count, results);
    S* out = params.out.at<S>(batch, sequence.first_query + rows.begin, head);
    key_tile.finish(results, acc, count,
                    [out, stride = params.out.token_stride](int64_t r) VK_BODY { return out + r * stride; });
    T* lse = static_cast<T*>(params.lse) + (sequence.first_row + rows.begin) * p.heads + head;
    for (int64_t r = 0; r < count; ++r) lse[r * p.heads] = results[r].lse;
  }

  const AttentionParams& params;
  const Problem& p = params.problem;
  Scratch scratch;
  const int64_t tasks_per_batch = p.heads * forward_query_blocks(p.axis);  // without packing
  const int64_t max_keys = std::min(round_up(p.num_keys(), kTileAlignment), kForwardKeyTile);
  const bool is_bias = is_bias_along_keys(p.score);
  const int64_t max_queries = std::min(p.num_queries(), kForwardQueryBlockLong);

  ForwardTile<S> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t value_width = key_tile.value_width;
  T* acc = scratch.take<T>(max_queries * value_width);
  RowState<T>* states = scratch.take<RowState<T>>(round_up(max_queries, kWidth<T>));
  RowResult<T>* results = scratch.take<RowResult<T>>(round_up(max_queries, kWidth<T>));
  OffsetRow<T> offset_row{p.score, {p.head_dim, max_queries, kRowGroup<E>, max_keys, false}, scratch};

  int64_t batch = 0, head = 0;
  Sequence sequence;
  Axis axis;
  Tiling keys{};
  int64_t packed_head = -1, packed_tile = -1;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Forward, AttentionParams);
