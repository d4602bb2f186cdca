// Tile sizes of the CPU attention kernels. They depend on shapes alone: results are the
// same for any number of threads.
#pragma once

#include <algorithm>

#include "attention/dense.h"
#include "attention/listed.h"
#include "attention/spatial.h"

namespace vitkernels {

inline constexpr int64_t kTileAlignment = 32;  // a multiple of every instruction set's panel

struct Tiling {
  int64_t count, size;  // the last tile may be shorter
};

inline Tiling tile_axis(int64_t length, int64_t largest) {
  const int64_t count = length > largest ? (length + largest - 1) / largest : 1;
  const int64_t size = ((length + count - 1) / count + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  return {size ? (length + size - 1) / size : 0, size};
}

// Forward. A row of logits that fits one tile needs no rescaling.
inline constexpr int64_t kForwardKeyTile = 768;
inline constexpr int64_t kForwardQueryBlock = 224;      // one tile: packing is shared by all blocks of a head
inline constexpr int64_t kForwardQueryBlockLong = 504;  // several tiles: every block packs them again

// Backward. Logits and their gradient, [query block, key tile] each, stay in the second-level cache.
inline constexpr int64_t kBackwardKeyTile = 320;
inline constexpr int64_t kBackwardQueryBlock = 84;

inline Tiling forward_keys(const Axis& axis) { return tile_axis(axis.num_keys, kForwardKeyTile); }

inline int64_t forward_query_blocks(const Axis& axis) {
  const int64_t largest = forward_keys(axis).count > 1 ? kForwardQueryBlockLong : kForwardQueryBlock;
  return (axis.num_queries + largest - 1) / largest;
}

inline Tiling backward_keys(const Axis& axis) { return tile_axis(axis.num_keys, kBackwardKeyTile); }

// Over a map: a query tile with a single KV tile reads its queries once, and prefetches for the next one.
inline constexpr int64_t kSpatialBackwardKeyTile = 448;

// Blocks of rows that a query tile is cut into.
inline int64_t spatial_row_blocks(const SpatialParams& p) {
  return std::max<int64_t>((p.max_queries() + kForwardQueryBlock - 1) / kForwardQueryBlock, 1);
}

// Rows of a block. A smaller block computes fewer logits that the mask discards.
inline int64_t spatial_backward_rows(const SpatialParams& p) {
  constexpr int64_t kFewRows = 14;
  return p.axis[0].see_all && p.axis[1].see_all && p.axis[2].see_all ? kBackwardQueryBlock : kFewRows;
}

// Groups of batches. Few if each expands the tables of its heads and holds partial sums of their gradients.
inline int64_t spatial_batch_groups(int64_t batch, int64_t kv_heads, bool has_tables) {
  constexpr int64_t kTasks = 32, kMaxGroups = 8;
  return has_tables ? std::min(batch, std::clamp<int64_t>(kTasks / (kv_heads + 1), 1, kMaxGroups)) : batch;
}

// Splits of the query tiles, for parallelism with few heads. Fewer if each holds partial sums of the key gradients: with
// a map of 56 x 56, four splits take 10% longer and 2.5 MB more.
inline int64_t spatial_backward_splits(const SpatialParams& p, int64_t batch_groups, bool has_sums) {
  constexpr int64_t kTasks = 32;
  const int64_t wanted = kTasks / (batch_groups * p.kv_heads + 1), max_splits = has_sums ? 2 : 4;
  return std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(p.num_tiles(), 1, max_splits));
}

// To listed keys: blocks of rows that the queries of a group are cut into.
inline int64_t listed_query_blocks(const ListedParams& p) {
  return std::max<int64_t>((p.queries.max_tokens() + kForwardQueryBlock - 1) / kForwardQueryBlock, 1);
}

// Splits of the groups in the backward, for parallelism with few heads. Each holds partial sums of all key gradients.
inline int64_t listed_splits(const ListedParams& p) {
  constexpr int64_t kTasks = 32, kMaxSplits = 2;
  const int64_t wanted = kTasks / (p.problem.batch * p.problem.kv_heads + 1);
  return std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(p.groups, 1, kMaxSplits));
}

// Transposed. A task owns a tile of keys; with few heads, tiles are smaller to keep several threads busy. Every tile
// reads all queries again, so tiles are large if the accumulators of a key take little memory.
inline constexpr int64_t kFewColumns = 8;  // of V'

inline Tiling transposed_keys(const Problem& p) {
  constexpr int64_t kTasks = 16, kSmallestTile = 96;
  const int64_t wanted = kTasks / (p.batch * p.heads + 1) + 1, size = (p.num_keys() + wanted - 1) / wanted;
  const int64_t largest = p.value_dim <= kFewColumns ? kForwardKeyTile : kBackwardKeyTile;
  return tile_axis(p.num_keys(), std::clamp(size, kSmallestTile, largest));
}

// Split-KV, for parallelism with few heads. Each split holds a partial query gradient in float32, so long sequences
// get fewer.
inline int64_t backward_splits(const AttentionBackwardParams& params) {
  constexpr int64_t kTasks = 32, kMaxSplits = 4, kPartElements = int64_t(1) << 23;
  const Problem& p = params.forward.problem;
  const int64_t part = params.forward.num_rows() * p.heads * p.head_dim;
  const int64_t max_splits = part * kMaxSplits <= kPartElements ? kMaxSplits : 2;
  const int64_t wanted = kTasks / (params.batch_groups() * params.head_groups() + 1);
  const int64_t tiles = params.forward.packing ? 1 : backward_keys(p.axis).count;  // packed: one task per sequence
  const int64_t splits = std::min(wanted, max_splits);
  return splits < 1 || tiles < 1 ? 1 : splits < tiles ? splits : tiles;
}

// Whether a task has all keys of its queries in one tile, so that their gradient needs no partial sums.
inline bool has_one_key_tile(const AttentionBackwardParams& params) {
  const Problem& p = params.forward.problem;
  return params.splits == 1 && backward_keys(p.axis).count <= 1 && !p.score.by_offset.has_rel_pos();
}

}  // namespace vitkernels
