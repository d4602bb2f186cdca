// Tile sizes of the attention kernels on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels {

// A block of threads takes `queries` queries of one head, sixteen a warp, and goes through the keys in tiles.
struct ForwardTile {
  int queries, keys, warps;

  constexpr int threads() const { return warps * 32; }
  // Queries, keys and values, of `dim` columns.
  constexpr int shared_bytes(int dim, int element_bytes) const { return (queries + 2 * keys) * dim * element_bytes; }
};

// By the padded head dimension; elements of two bytes, or four. All fit into the 99 KB of consumer GPUs. Not measured on
// a GPU yet.
constexpr ForwardTile forward_tile(int dim, int element_bytes) {
  const bool is_wide = element_bytes == 4;
  if (dim <= 32) return {.queries = 128, .keys = 64, .warps = 8};                 // 16 KB, 32 KB; 128 keys spill
  if (dim <= 64) return {.queries = 128, .keys = 64, .warps = 8};                 // 32 KB, 64 KB
  if (dim <= 128) return {.queries = 64, .keys = is_wide ? 32 : 64, .warps = 4};  // 48 KB, 64 KB
  return {.queries = 64, .keys = is_wide ? 16 : 32, .warps = 4};                  // 64 KB, 96 KB
}

// A block of threads owns keys (or queries), sixteen a warp, and goes through the queries (or keys) in tiles of which one
// arrives while the other is multiplied.
struct BackwardTile {
  int owned, streamed, warps;
  int columns;  // of the gradients of keys and values that fit into registers together

  constexpr int threads() const { return warps * 32; }
  // Two tensors of each: keys and values, queries and output gradients. A gradient of the score terms needs one stage.
  constexpr int shared_bytes(int dim, int stages, int element_bytes) const {
    return 2 * (owned + stages * streamed) * dim * element_bytes;
  }
};

// As forward_tile. The worst is float above 128 columns: two warps a block, which has all the shared memory there is, and
// eight tokens a tile. Some kernels spill, up to 240 bytes (docs/cuda_report.md). Tried and left: sixteen streamed tokens
// at 128 columns of 16 bits, which spill nothing but have twice the barriers; launch bounds of one block at 32 columns,
// which spill nothing but take 184 registers for 168, two blocks of a multiprocessor's three; and the task computed again
// for the stores, which spills more. Not measured on a GPU yet.
constexpr BackwardTile backward_tile(int dim, int element_bytes) {
  const bool is_wide = element_bytes == 4;
  if (dim <= 32) return {.owned = 64, .streamed = 32, .warps = 4, .columns = 32};                   // 16 KB, 32 KB
  if (dim <= 64) return {.owned = 64, .streamed = 32, .warps = 4, .columns = 64};                   // 32 KB, 64 KB
  if (dim <= 128) return {.owned = 64, .streamed = is_wide ? 16 : 32, .warps = 4, .columns = 128};  // 64 KB, 96 KB
  if (is_wide) return {.owned = 32, .streamed = 8, .warps = 2, .columns = 128};                     // 96 KB
  return {.owned = 64, .streamed = 16, .warps = 4, .columns = 128};                                 // 96 KB
}

// Into how many ranges the tokens are split that stream past a kernel's blocks. By shapes alone, whatever the GPU: so many
// blocks keep a large one busy, and fewer tokens are not worth the sums in memory. Not measured on a GPU yet.
inline constexpr int64_t kBlocksOfLargeGpu = 256, kLeastTokensOfSplit = 256;

constexpr int64_t splits_of(int64_t blocks, int64_t tokens) {
  if (blocks == 0) return 1;
  return std::max<int64_t>(1, std::min(kBlocksOfLargeGpu / blocks, tokens / kLeastTokensOfSplit));
}

}  // namespace vitkernels
