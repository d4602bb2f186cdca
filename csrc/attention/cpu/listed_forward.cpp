// Forward of attention to listed keys on the CPU. Compiled once per instruction set.
//
// A task is a block of the queries of one head's group. Its keys are packed from where they are: nothing is gathered.

#include "attention/cpu/forward_tile.h"
#include "attention/cpu/listed_group.h"
#include "attention/cpu/tile_sizes.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class ListedForward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  ListedForward(const ListedParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    std::fill_n(zeros, std::max(p.head_dim, p.value_dim), S{});
    if (begin < end) find(begin / num_blocks);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % num_blocks;
      if (block == 0 || task == begin) {
        std::swap(present, next);
        packed_column = -1;
      }
      const int64_t count = present.queries.count;
      const Range rows{count * block / num_blocks, count * (block + 1) / num_blocks};
      next_share = 0;
      if (block == num_blocks - 1 && task + 1 < end) {
        find((task + 1) / num_blocks);
        // With several KV tiles, each of them would prefetch it.
        const bool is_short = present.keys.count <= kForwardKeyTile;
        if (is_short) next_share = divide_up(next.count(), std::max<int64_t>(rows.end - rows.begin, 1));
      }
      block_of_queries(rows);
    }
  }

 private:
  // The rows of all tensors that a group of a head reads and writes.
  struct Rows : ListedGroup<S> {
    ListedRows<S> outputs;

    Rows(const ListedParams& params, Scratch& scratch)
        : ListedGroup<S>(params, scratch), outputs(params.queries.max_tokens(), params.problem.value_dim, scratch) {}

    int64_t count() const { return std::max(this->queries.count, this->keys.count); }
    VK_INLINE void prefetch(Range tokens, int turn) const {
      if (turn == 0) this->keys.prefetch(tokens);
      if (turn == 1) this->values.prefetch(tokens);
      if (turn == 2) this->queries.prefetch(tokens);
      if (turn == 3) outputs.prefetch(tokens);
    }
  };

  void find(int64_t index) {
    const int64_t head = index / params.groups % p.heads, batch = index / params.groups / p.heads;
    next.find(params, batch, head, index % params.groups, zeros);
    next.outputs.find(params.out, batch, head, next.query_tokens, next.queries.count);
  }

  void block_of_queries(Range rows) {
    if (rows.empty()) return;
    const int64_t count = rows.end - rows.begin, num_keys = present.keys.count;
    const Tiling kv_tiles = tile_axis(num_keys, kForwardKeyTile);
    std::fill_n(states, count, RowState<T>{});
    if (kv_tiles.count != 1) std::fill_n(acc, count * value_width, T(0));
    for (int64_t kv_tile = 0; kv_tile < kv_tiles.count; ++kv_tile) {
      const Range columns{kv_tile * kv_tiles.size, std::min((kv_tile + 1) * kv_tiles.size, num_keys)};
      if (packed_column != columns.begin) {
        packed_column = columns.begin;
        key_tile.pack(present.keys.from(columns.begin), present.values.from(columns.begin),
                      columns.end - columns.begin);
      }
      const int64_t groups = divide_up(count, kRowGroup<E>);
      for (int64_t group = 0; group < groups; ++group) {
        group_of_rows(rows, {rows.begin + count * group / groups, rows.begin + count * (group + 1) / groups},
                      columns.end - columns.begin, kv_tiles.count == 1);
      }
    }
    finish(rows);
  }

  void group_of_rows(Range block, Range rows, int64_t columns, bool is_only_tile) {
    const int64_t first_row = rows.begin - block.begin, count = rows.end - rows.begin;
    const Range seen{0, columns};
    key_tile.add(
        {present.queries.from(rows.begin), count, acc + first_row * value_width, states + first_row, is_only_tile},
        seen, p.score.scale_of<T>(present.head), false, [&](int64_t) VK_BODY { return seen; },
        [](T*, int64_t, Range, int64_t, T) VK_BODY { return T(0); },
        [&](int turn) VK_BODY { next.prefetch({first_row * next_share, (first_row + count) * next_share}, turn); });
  }

  void finish(Range rows) {
    const int64_t count = rows.end - rows.begin;
    finish_rows(states, count, results);
    key_tile.finish(results, acc, count,
                    [out = present.outputs.from(rows.begin)](int64_t r) VK_BODY { return const_cast<S*>(out[r]); });
    T* lse = static_cast<T*>(params.lse) + present.batch * p.num_queries() * p.heads + present.head;
    for (int64_t r = 0; r < count; ++r) lse[present.query_tokens[rows.begin + r] * p.heads] = results[r].lse;
  }

  const ListedParams& params;
  const Problem& p = params.problem;
  Scratch scratch;
  const int64_t num_blocks = listed_query_blocks(params);
  const int64_t max_keys = std::min(round_up(params.keys.max_tokens(), kTileAlignment), kForwardKeyTile);
  const int64_t max_rows = divide_up(params.queries.max_tokens(), num_blocks);

  ForwardTile<S, ScatteredRows<S>> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t value_width = key_tile.value_width;
  S* zeros = scratch.take<S>(std::max(p.head_dim, p.value_dim));
  T* acc = scratch.take<T>(max_rows * value_width);
  RowState<T>* states = scratch.take<RowState<T>>(round_up(max_rows, kWidth<T>));
  RowResult<T>* results = scratch.take<RowResult<T>>(round_up(max_rows, kWidth<T>));

  Rows present{params, scratch}, next{params, scratch};
  int64_t packed_column = -1;
  int64_t next_share = 0;  // tokens of the next group to prefetch per row of this one
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(ListedForward, ListedParams);
