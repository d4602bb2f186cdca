// Forward of attention over maps on the CPU. Compiled once per instruction set.
//
// A task is a block of rows of one head's query tile. Heads are the outermost loop: logit tiles expanded from a head's
// tables stay in the cache.

#include "attention/cpu/spatial_terms.h"
#include "attention/cpu/tile_sizes.h"
#include "attention/cpu/tile_tokens.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class SpatialForward {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  SpatialForward(const SpatialParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    std::fill_n(zeros, std::max(p.head_dim, p.value_dim), S{});
    if (begin < end) find(begin / num_blocks);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % num_blocks;
      if (block == 0 || task == begin) {
        std::swap(present, next);
        tile.start(present.boxes);
        packed_column = -1;
      }
      const int64_t count = tile.queries.count();
      const Range rows{count * block / num_blocks, count * (block + 1) / num_blocks};
      next_share = 0;
      if (block == num_blocks - 1 && task + 1 < end) {
        find((task + 1) / num_blocks);
        // With several KV tiles, each of them would prefetch it.
        const bool is_short = tile.keys.count() <= kForwardKeyTile;
        if (is_short) next_share = divide_up(next.count(), std::max<int64_t>(rows.end - rows.begin, 1));
      }
      rows_of_tile(block, rows);
    }
  }

 private:
  // The rows of all tensors that a tile of a head reads and writes.
  struct Tokens : TileInputs<S> {
    TileBoxes boxes;
    int64_t batch = 0, head = 0;
    TileTokens<S> outputs;

    Tokens(const SpatialParams& p, Scratch& scratch)
        : TileInputs<S>(p, scratch), outputs(p.max_queries(), p.value_dim, scratch) {}

    int64_t count() const { return std::max(this->queries.count, this->keys.count); }
    VK_INLINE void prefetch(Range tokens, int turn) const {
      if (turn == 0) this->keys.prefetch(tokens);
      if (turn == 1) this->values.prefetch(tokens);
      if (turn == 2) this->queries.prefetch(tokens);
      if (turn == 3) outputs.prefetch(tokens);
    }
  };

  void find(int64_t index) {
    const int64_t num_tiles = p.num_tiles();
    next.batch = index / num_tiles % p.batch, next.head = index / num_tiles / p.batch;
    next.boxes = tile.boxes_of(index % num_tiles);
    next.TileInputs<S>::find(p, next.boxes, next.batch, next.head, zeros);
    next.outputs.find(p.out, next.batch, next.head, next.boxes.outputs);
  }

  void rows_of_tile(int64_t block, Range rows) {
    if (rows.empty()) return;
    const int64_t count = rows.end - rows.begin;
    const Tiling kv_tiles = tile_axis(tile.keys.count(), kForwardKeyTile);
    std::fill_n(states, count, RowState<T>{});
    if (kv_tiles.count != 1) std::fill_n(acc, count * value_width, T(0));
    for (int64_t kv_tile = 0; kv_tile < kv_tiles.count; ++kv_tile) {
      const Range columns{kv_tile * kv_tiles.size, std::min((kv_tile + 1) * kv_tiles.size, tile.keys.count())};
      if (intersect(tile.seen_by_any(rows), columns).empty()) continue;
      if (packed_column != columns.begin) {
        packed_column = columns.begin;
        key_tile.pack(present.keys.from(columns.begin), present.values.from(columns.begin),
                      columns.end - columns.begin);
      }
      if (terms.any_on(tile)) {
        terms.start_columns(present.batch, present.head, tile, columns);
        terms.start_logit_tile(present.head,
                               {rows, columns, block * kv_tiles.count + kv_tile, num_blocks * kv_tiles.count}, 0);
      }
      const int64_t groups = divide_up(count, kRowGroup<E>);
      for (int64_t group = 0; group < groups; ++group) {
        group_of_rows(rows, {rows.begin + count * group / groups, rows.begin + count * (group + 1) / groups}, columns,
                      kv_tiles.count == 1);
      }
    }
    finish(rows);
  }

  void group_of_rows(Range block, Range rows, Range columns, bool is_only_tile) {
    const Range seen = relative_to(intersect(tile.seen_by_any(rows), columns), columns.begin);
    if (seen.empty()) return;
    const int64_t first_row = rows.begin - block.begin;
    const ScatteredRows<S> of_group = present.queries.from(rows.begin);
    const bool has_terms = terms.any_on(tile);
    if (has_terms) terms.start_rows(of_group, rows);
    const bool is_bias = has_terms && terms.is_bias();
    key_tile.add(
        {of_group, rows.end - rows.begin, acc + first_row * value_width, states + first_row, is_only_tile,
         is_bias ? terms.bias_row(rows.begin, 0).bias : nullptr, is_bias ? terms.bias_stride() : 0},
        seen, p.score.scale_of<T>(present.head), has_terms,
        [&](int64_t r) VK_BODY { return relative_to(intersect(tile.seen_by(rows.begin + r), columns), columns.begin); },
        [&](T* row, int64_t r, Range visible, int64_t first_key, T scale) VK_BODY {
          return terms.is_bias() ? apply_score(row, visible, scale, terms.bias_row(rows.begin + r, first_key))
                                 : apply_score(row, visible, scale, terms.row(rows.begin + r, first_key));
        },
        [&](int turn) VK_BODY {
          next.prefetch({first_row * next_share, (first_row + rows.end - rows.begin) * next_share}, turn);
        });
  }

  void finish(Range rows) {
    constexpr int kLast = kMaxAxes - 1;
    finish_rows(states, rows.end - rows.begin, results);
    key_tile.finish(results, acc, rows.end - rows.begin,
                    [out = present.outputs.from(rows.begin)](int64_t r) VK_BODY { return const_cast<S*>(out[r]); });
    const Box& outputs = tile.outputs;
    outputs.for_each_line(rows, [&](int64_t row, int64_t count, const Coord& index) {
      T* lse = static_cast<T*>(p.lse) + p.row(present.batch, outputs.on_map(index)) * p.heads + present.head;
      for (int64_t i = 0; i < count; ++i) lse[i * outputs.step[kLast] * p.heads] = results[row - rows.begin + i].lse;
    });
  }

  const SpatialParams& p;
  Scratch scratch;
  const int64_t num_blocks = spatial_row_blocks(p);
  const int64_t max_keys = std::min(round_up(p.max_keys(), kTileAlignment), kForwardKeyTile);
  const int64_t max_rows = divide_up(p.max_queries(), num_blocks);

  SpatialTile tile{p, scratch};
  ForwardTile<S, ScatteredRows<S>> key_tile{p.head_dim, p.value_dim, max_keys, scratch};
  const int64_t value_width = key_tile.value_width;
  S* zeros = scratch.take<S>(std::max(p.head_dim, p.value_dim));
  T* acc = scratch.take<T>(max_rows * value_width);
  RowState<T>* states = scratch.take<RowState<T>>(round_up(max_rows, kWidth<T>));
  RowResult<T>* results = scratch.take<RowResult<T>>(round_up(max_rows, kWidth<T>));
  SpatialTerms<T> terms{
      p,
      {max_rows, max_keys, num_blocks* tile_axis(p.max_keys(), kForwardKeyTile).count, kRowGroup<E>, false},
      scratch};

  Tokens present{p, scratch}, next{p, scratch};
  int64_t packed_column = -1;
  int64_t next_share = 0;  // tokens of the next tile to prefetch per row of this one
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(SpatialForward, SpatialParams);
