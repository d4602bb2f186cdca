// Forward of attention over maps on the CPU. Compiled once per instruction set.
//
// A task is a tile of queries of one head; large tiles are cut into blocks of rows. Heads are outermost: what is expanded
// from a head's tables stays in the cache.

#include "attention/spatial_terms_cpu.h"
#include "attention/tiles_cpu.h"
#include "cpu/kernels.h"

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
    const int64_t num_tiles = p.num_tiles();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % num_blocks, index = task / num_blocks;
      head = index / num_tiles / p.batch, batch = index / num_tiles % p.batch;
      tile.start(index % num_tiles);
      const int64_t count = tile.queries.count();
      rows_of_tile(index, block, {count * block / num_blocks, count * (block + 1) / num_blocks});
    }
  }

 private:
  void rows_of_tile(int64_t index, int64_t block, Range rows) {
    if (rows.empty()) return;
    const int64_t count = rows.end - rows.begin;
    const Tiling stretches = tile_axis(tile.keys.count(), kForwardKeyTile);
    std::fill_n(states, count, RowState<T>{});
    if (stretches.count != 1) std::fill_n(sums, count * value_width, T(0));
    queries = query_rows.of(p.query, batch, head, tile.queries, rows);
    for (int64_t stretch = 0; stretch < stretches.count; ++stretch) {
      const Range columns{stretch * stretches.size, std::min((stretch + 1) * stretches.size, tile.keys.count())};
      if (intersect(tile.seen_by_any(rows), columns).empty()) continue;
      pack(index, columns);
      if (terms.any_on(tile)) {
        terms.start_columns(batch, head, tile, columns);
        terms.start_piece(head, {rows, columns, block * stretches.count + stretch, num_blocks * stretches.count}, 0);
      }
      const int64_t groups = divide_up(count, kRowGroup<E>);
      for (int64_t group = 0; group < groups; ++group) {
        group_of_rows(rows, {rows.begin + count * group / groups, rows.begin + count * (group + 1) / groups}, columns,
                      stretches.count == 1);
      }
    }
    finish(rows);
  }

  void pack(int64_t index, Range columns) {
    if (packed_index == index && packed_column == columns.begin) return;
    packed_index = index, packed_column = columns.begin;
    const int64_t kv_head = p.kv_head_of[head];
    key_tile.pack(
        key_rows.of(p.key, batch, kv_head, tile.keys, columns, p.key_size, fill(p.key_fill, p.head_dim)),
        value_rows.of(p.value, batch, kv_head, tile.keys, columns, p.key_size, fill(p.value_fill, p.value_dim)),
        columns.end - columns.begin);
  }

  const S* fill(const void* rows, int64_t dim) const {
    return rows ? static_cast<const S*>(rows) + p.kv_head_of[head] * dim : nullptr;
  }

  void group_of_rows(Range block, Range rows, Range columns, bool is_only_tile) {
    const Range seen = relative_to(intersect(tile.seen_by_any(rows), columns), columns.begin);
    if (seen.empty()) return;
    const int64_t first_row = rows.begin - block.begin;
    const TensorRows<S> of_group = queries.from(first_row);
    const bool has_terms = terms.any_on(tile);
    if (has_terms) terms.start_rows(of_group, rows);
    key_tile.add(
        {of_group, rows.end - rows.begin, sums + first_row * value_width, states + first_row, is_only_tile}, seen,
        p.score.scale_of<T>(head), has_terms,
        [&](int64_t r) VK_BODY { return relative_to(intersect(tile.seen_by(rows.begin + r), columns), columns.begin); },
        [&](T* row, int64_t r, Range visible, int64_t first_key, T scale)
            VK_BODY { return apply_score(row, visible, scale, terms.row(rows.begin + r, first_key)); });
  }

  void finish(Range rows) {
    T* lse = static_cast<T*>(p.lse);
    const Box outputs = tile.outputs();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Place place = outputs.on_map(outputs.index(row));
      const RowState<T>& state = states[row - rows.begin];
      key_tile.finish(state, sums + (row - rows.begin) * value_width, p.out.at<S>(batch, place, head));
      lse[p.row(batch, place) * p.heads + head] = state.lse();
    }
  }

  const SpatialParams& p;
  Scratch scratch;
  const int64_t num_blocks = spatial_row_blocks(p);
  const int64_t most_keys = std::min(round_up(p.most_keys(), kTileAlignment), kForwardKeyTile);
  const int64_t most_rows = divide_up(p.most_queries(), num_blocks);

  SpatialTile tile{p, scratch};
  ForwardTile<S> key_tile{p.head_dim, p.value_dim, most_keys, scratch};
  const int64_t value_width = key_tile.value_width;
  BoxRows<S> query_rows{most_rows, p.head_dim, scratch};
  BoxRows<S> key_rows{most_keys, p.head_dim, scratch}, value_rows{most_keys, p.value_dim, scratch};
  T* sums = scratch.take<T>(most_rows * value_width);
  RowState<T>* states = scratch.take<RowState<T>>(most_rows);
  SpatialTerms<T> terms{
      p,
      {most_rows, most_keys, num_blocks* tile_axis(p.most_keys(), kForwardKeyTile).count, kRowGroup<E>, false},
      scratch};

  int64_t batch = 0, head = 0;
  int64_t packed_index = -1, packed_column = -1;
  TensorRows<S> queries{};
};

}  // namespace

int64_t spatial_attention_scratch(const SpatialParams& params) {
  int64_t size = 0;
  dispatch_dtype(params.dtype, [&]<class S>(S) { size = SpatialForward<S>(params, nullptr).scratch_size(); });
  return size;
}

void spatial_attention(const SpatialParams& params, int64_t begin, int64_t end, void* scratch) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { SpatialForward<S>(params, scratch).run(begin, end); });
}

}  // namespace vitkernels::VK_ISA
