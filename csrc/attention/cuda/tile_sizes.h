// Tile sizes of the attention kernels on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels {

// A thread block takes a tile of `queries` queries of one head, sixteen a warp, and iterates over KV tiles of `keys`
// keys.
struct ForwardTileShape {
  int queries, keys, warps;
  int min_blocks = 1;  // of a multiprocessor, which bounds the registers

  constexpr int threads() const { return warps * 32; }
  // Queries, keys and values, of `dim` columns.
  constexpr int shared_bytes(int dim, int element_bytes) const { return (queries + 2 * keys) * dim * element_bytes; }
};

// By the padded head dimension, for elements of two or four bytes. All fit into the 99 KB of shared memory of consumer
// GPUs. Not measured on a GPU yet.
constexpr ForwardTileShape forward_tile(int dim, int element_bytes) {
  const bool is_wide = element_bytes == 4;
  if (dim <= 64) return {.queries = 128, .keys = 64, .warps = 8};                 // 32 KB, 64 KB
  if (dim <= 128) return {.queries = 64, .keys = is_wide ? 32 : 64, .warps = 4};  // 48 KB, 64 KB
  return {.queries = 64, .keys = is_wide ? 16 : 32, .warps = 4};                  // 64 KB, 96 KB
}

// Of forward_plain.cu: 32 queries a warp: a fragment of keys and values serves two rows of instructions. Two blocks a
// multiprocessor. Instructions of the main loop for each matrix instruction, sm_90: 6.9, 4.2, 3.0; with a bias 8.5, 5.4,
// 3.9. Rejected: three blocks at 32 columns (7.5: 168 registers make copies), 128 keys there (spills), 64 keys at 128
// columns (spills) and 32 (0.38 loads a matrix instruction), and the next tile's logits before this one's softmax (8.0,
// 5.1, and spills with a bias at 64 columns and at 128: two tiles of logits in registers). Not measured on a GPU yet.
constexpr ForwardTileShape plain_forward_tile(int dim, bool has_bias) {
  ForwardTileShape tile{.queries = 128, .keys = 64, .warps = 4, .min_blocks = 2};  // 16 KB, 32 KB
  if (dim > 64) tile.keys = has_bias ? 32 : 48;                                    // 48 KB, 56 KB
  return tile;
}
inline constexpr int kMaxPlainTile = 128, kMinPlainTile = 32;

// Of forward_resident.cu: four warps a block, sixteen queries a warp and step. The logits of 256 keys take half of the
// registers. Rejected: a branch for each sixteen keys of all, instead of the last 64 (more instructions than it saves,
// and products of two matrix instructions that wait for each other).
inline constexpr int kMaxResidentKeys = 256, kResidentQueries = 16, kMinResidentQueries = 64;

// A thread block owns a tile of keys (or queries), sixteen a warp, and streams tiles of queries (or keys) past it, in
// two stages.
struct BackwardTileShape {
  int owned, streamed, warps;
  int columns;         // of the accumulators of both dK and dV: what fits into registers
  int min_blocks = 1;  // of a multiprocessor, which bounds the registers

  constexpr int threads() const { return warps * 32; }
  // Two tensors of each: keys and values, queries and output gradients.
  constexpr int shared_bytes(int dim, int stages, int element_bytes) const {
    return 2 * (owned + stages * streamed) * dim * element_bytes;
  }
};

// As forward_tile. The worst case is float above 128 columns: two warps a block, which takes all shared memory, and
// eight streamed tokens a tile. Some kernels spill (docs/cuda_report.md). Rejected: sixteen streamed tokens at 128 columns
// of 16 bits (no spills, but twice the barriers); recomputing the task for the stores (more spills). Not measured on a
// GPU yet.
constexpr BackwardTileShape backward_tile(int dim, int element_bytes) {
  const bool is_wide = element_bytes == 4;
  if (dim <= 64)
    return {.owned = 64, .streamed = 32, .warps = 4, .columns = 64, .min_blocks = is_wide ? 2 : 1};  // 32 KB, 64 KB
  if (dim <= 128) return {.owned = 64, .streamed = is_wide ? 16 : 32, .warps = 4, .columns = 128};   // 64 KB, 96 KB
  if (is_wide) return {.owned = 32, .streamed = 8, .warps = 2, .columns = 128};                      // 96 KB
  return {.owned = 64, .streamed = 16, .warps = 4, .columns = 128};                                  // 96 KB
}

// Of the backward's fast paths, for 16-bit elements. Instructions of the main loop for each matrix instruction, sm_90,
// at 32, 64 and 128 columns: blocks that own keys 5.0, 3.3, 3.2, queries 5.1, 3.5, 2.9; with a bias at 64 columns 4.9
// and 4.1; blocks that own all keys 4.3, with a bias 5.2. Rejected: two unrolled stages (3.0 at 64 columns, but
// spills), dP in halves, and fragments of the second operand read ahead one by one (more instructions, and spills at 128
// columns). Not measured on a GPU yet.
struct PlainBackwardTile {
  int owned, streamed, warps, min_blocks;

  constexpr int threads() const { return warps * 32; }
};

constexpr PlainBackwardTile plain_keys_tile(int dim) {
  if (dim <= 64) return {.owned = 128, .streamed = 32, .warps = 4, .min_blocks = 2};
  return {.owned = 64, .streamed = 32, .warps = 4, .min_blocks = 2};
}

constexpr PlainBackwardTile plain_queries_tile(int dim) {
  return {.owned = 128, .streamed = dim <= 64 ? 64 : 32, .warps = 4, .min_blocks = 2};
}

// A block owns all keys of a head.
constexpr PlainBackwardTile resident_backward_tile() {
  return {.owned = 256, .streamed = 32, .warps = 8, .min_blocks = 1};
}

// The number of splits of the tokens that stream past a kernel's blocks. It depends on shapes alone, not on the GPU, so
// that results do not either: so many blocks keep a large GPU busy, and splits of fewer tokens are not worth their
// partial sums in memory. Not measured on a GPU yet.
inline constexpr int64_t kBlocksOfLargeGpu = 256, kMinTokensPerSplit = 256;

constexpr int64_t splits_of(int64_t blocks, int64_t tokens) {
  if (blocks == 0) return 1;
  return std::max<int64_t>(1, std::min(kBlocksOfLargeGpu / blocks, tokens / kMinTokensPerSplit));
}

}  // namespace vitkernels
