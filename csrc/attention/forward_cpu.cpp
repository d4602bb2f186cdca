// Forward of softmax attention on the CPU. Compiled once per instruction set.
//
// A task is a block of queries of one head. The keys come in tiles, packed once per head as long as the
// task's thread stays with it; a row of up to kForwardKeyTile keys is one tile, and its softmax needs no rescaling.
// Queries go through in groups of as many rows as the register tile has: their logits stay in the
// first-level cache from the first product to the second.

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

template <class S>
class Forward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Forward(const AttentionParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    batch = p.first_task ? std::upper_bound(p.first_task, p.first_task + p.batch + 1, begin) - p.first_task - 1
                         : begin / tasks_of_entry;
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
  int64_t first_task(int64_t entry) const { return p.first_task ? p.first_task[entry] : entry * tasks_of_entry; }

  void start_sequence() {
    sequence = p.sequence(batch);
    axis = sequence.axis;
    keys = forward_keys(axis);
    packed_head = -1;
  }

  void block_of_queries(Range rows) {
    const int64_t count = rows.end - rows.begin;
    std::fill_n(states, count, RowState<T>{});
    if (keys.count != 1) std::fill_n(sums, count * value_width, T(0));
    for (int64_t tile = 0; tile < keys.count; ++tile) {
      const Range tile_keys{tile * keys.size, std::min((tile + 1) * keys.size, axis.num_keys)};
      if (intersect(axis.any_keys(rows), tile_keys).empty()) continue;
      pack(tile, tile_keys);
      const int64_t groups = divide_up(count, kRowGroup<E>);
      for (int64_t group = 0; group < groups; ++group) {
        group_of_rows(rows, {rows.begin + count * group / groups, rows.begin + count * (group + 1) / groups},
                      tile_keys);
      }
    }
    finish(rows);
  }

  void pack(int64_t tile, Range tile_keys) {
    const int64_t kv_head = p.kv_head_of[head];
    if (packed_head == kv_head && packed_tile == tile) return;
    packed_head = kv_head, packed_tile = tile;
    const int64_t first = sequence.first_key + tile_keys.begin;
    const int64_t count = tile_keys.end - tile_keys.begin;
    key_tile.pack(p.key.at<const S>(batch, first, kv_head), p.key.token_stride, count);
    pack_groups(p.value.at<const S>(batch, first, kv_head), p.value.token_stride, count, p.value_dim, values,
                value_width);
  }

  // Adds what the queries `rows` see in one tile of keys to their sums; `block` holds the sums' rows.
  void group_of_rows(Range block, Range rows, Range tile_keys) {
    const Range seen = relative_to(intersect(axis.any_keys(rows), tile_keys), tile_keys.begin);
    if (seen.empty()) return;
    const int64_t count = rows.end - rows.begin;
    const T scale = p.score.scale_of<T>(head), left_scale = kFoldsScale<E> ? T(1) : scale;
    pack_queries(p.query.at<const S>(batch, sequence.first_query + rows.begin, head), p.query.token_stride, count,
                 p.head_dim, scale, queries, query_width);               // [count, d]
    key_tile.multiply(queries, count, seen.end, logits, logits_stride);  // [count, seen]

    // Maxima first, exponentials after: the rows of a loop are independent and overlap in the CPU.
    T largest[kRowGroup<E>];
    for (int64_t r = 0; r < count; ++r) {
      T* row = logits + r * logits_stride;
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile_keys), tile_keys.begin);
      largest[r] = p.score.has_terms() ? apply_score(row, visible, left_scale,
                                                     ScoreRow<T>(p.score, batch, head, query, tile_keys.begin))
                                       : row_max(row, visible, left_scale);
    }
    // Their terms applied, logits need no factor any more.
    const T logit_scale = p.score.has_terms() ? T(1) : left_scale;
    const int64_t depth = padded_depth<E>(seen.end);
    T* group_sums = sums + (rows.begin - block.begin) * value_width;  // [count, dv]
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = rows.begin + r;
      const Range visible = relative_to(intersect(axis.keys(query), tile_keys), tile_keys.begin);
      T* row = logits + r * logits_stride;
      const T factor = exponentiate(row, reinterpret_cast<E*>(row), visible, depth, logit_scale, largest[r],
                                    states[query - block.begin]);
      if (keys.count > 1 && factor != T(1)) rescale(group_sums + r * value_width, factor);
    }
    const MatmulA<E> probabilities{reinterpret_cast<const E*>(logits), logits_stride * kGroup<E>, kGroup<E>};
    const MatmulB<E> value_rows{values, value_width * kGroup<E>, kPanel<E> * kGroup<E>};
    if (keys.count > 1) {
      matmul<E, true>(probabilities, value_rows, count, value_width, depth, group_sums, value_width);  // [count, dv]
    } else {
      matmul<E, false>(probabilities, value_rows, count, value_width, depth, group_sums, value_width);
    }
  }

  void rescale(T* row, T factor) const {
    for (int64_t c = 0; c < value_width; c += kWidth<T>) store(row + c, load(row + c) * factor);
  }

  void finish(Range rows) {
    T* lse = static_cast<T*>(p.lse);
    for (int64_t query = rows.begin; query < rows.end; ++query) {
      const RowState<T>& state = states[query - rows.begin];
      T* row = sums + (query - rows.begin) * value_width;
      if (state.sum == T(0)) clear(row, {0, value_width});  // saw no key: zero, whatever the row holds
      const T factor = state.sum == T(0) ? T(0) : T(1) / state.sum;
      unpack_rows<T>(row, value_width, 1, p.value_dim, factor, p.out.at<S>(batch, sequence.first_query + query, head),
                     p.out.token_stride);
      lse[(sequence.first_row + query) * p.heads + head] = state.lse();
    }
  }

  const AttentionParams& p;
  Scratch scratch;
  const int64_t tasks_of_entry = p.heads * forward_query_blocks(p.pattern.axis[0]);  // without packing
  const int64_t most_keys = std::min(round_up(p.num_keys(), kTileAlignment), kForwardKeyTile);
  const int64_t most_queries = std::min(p.num_queries(), kForwardQueryBlockLong);
  const int64_t query_width = round_up(p.head_dim, kOperandWidth<E>);
  const int64_t value_width = round_up(p.value_dim, kWidth<T>);
  // Rows an odd number of vectors apart do not compete for the same cache set.
  const int64_t logits_stride = (most_keys / kWidth<T> | 1) * kWidth<T>;

  E* queries = scratch.take<E>(kRowGroup<E> * query_width);
  T* logits = scratch.take<T>(kRowGroup<E> * logits_stride);  // then the exponentials, as operands
  KeyTile<E> key_tile{scratch.take<E>(most_keys * padded_depth<E>(p.head_dim)),
                      scratch.take<E>(kMostLastKeys* query_width), p.head_dim, query_width};
  E* values = scratch.take<E>(most_keys * value_width);
  T* sums = scratch.take<T>(most_queries * value_width);
  RowState<T>* states = scratch.take<RowState<T>>(most_queries);

  int64_t batch = 0, head = 0;
  Sequence sequence;
  Axis axis;
  Tiling keys{};
  int64_t packed_head = -1, packed_tile = -1;
};

}  // namespace

int64_t attention_scratch(const AttentionParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = Forward<S>(params, nullptr).scratch_size(); });
  return size;
}

void attention(const AttentionParams& params, int64_t begin, int64_t end, void* scratch) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { Forward<S>(params, scratch).run(begin, end); });
}

}  // namespace vitkernels::VK_ISA
