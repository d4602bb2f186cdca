// Launches of the decayed linear attention kernels on a GPU. Plain data, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "linear_attention/decayed.h"

namespace vitkernels {

inline constexpr int64_t kDecayedTile = 64;  // tokens whose pairs are multiplied

// Columns of the values, and of the state, that a block has. More would not fit into registers.
constexpr int64_t decayed_values(bool is_float32, int64_t head_dim) {
  return !is_float32 && head_dim > 32 && head_dim <= 64 ? 64 : 32;
}

// How many blocks share the tiles of a sequence: by shapes alone, since their states are rounded.
inline int64_t decayed_splits(const DecayedParams& p) {
  constexpr int64_t kBlocks = 2 * 132;  // enough for a large GPU
  constexpr int64_t kMinTokens = 256;   // fewer would not pay for reading keys and values twice
  const int64_t values = decayed_values(p.dtype == DType::kFloat32, p.head_dim);
  const int64_t owners = p.num_pairs() * ((p.value_dim + values - 1) / values);
  return std::clamp<int64_t>(kBlocks / std::max<int64_t>(owners, 1), 1, std::max<int64_t>(p.tokens / kMinTokens, 1));
}

// A share of the tiles, in the order in which the state passes them; the first token may be the last in memory.
struct DecayedShare {
  int64_t tokens;
  bool is_reversed;
  int first, end, tiles;

  VK_HOST_DEVICE DecayedShare(const DecayedParams& p, int64_t split, int64_t splits)
      : tokens(p.tokens), is_reversed(p.is_reversed), tiles(int((p.tokens + kDecayedTile - 1) / kDecayedTile)) {
    first = int(tiles * split / splits), end = int(tiles * (split + 1) / splits);
  }
  VK_HOST_DEVICE int64_t first_token(int tile) const { return (is_reversed ? tiles - 1 - tile : tile) * kDecayedTile; }
  VK_HOST_DEVICE int64_t num_tokens(int tile) const {
    const int64_t left = tokens - first_token(tile);
    return left < kDecayedTile ? left : kDecayedTile;
  }
};

// `stage` says what blocks do: kSum leaves the sums of shares in chunk_states [splits, pairs, d, dv], and kRead reads there
// the states before them; kAll is for one share.
template <DType kDType>
struct DecayedLaunches {
  static cudaError_t run(const DecayedParams& params, int64_t splits, bool allow_tf32, cudaStream_t stream);
};

// From the sums of shares to the states before them, and the last state.
cudaError_t launch_decayed_prefix(const DecayedParams& params, int64_t splits, cudaStream_t stream);
// state [pairs, d, dv] times the decays.
cudaError_t launch_decay_once(const DecayedParams& params, float* state, cudaStream_t stream);

}  // namespace vitkernels
