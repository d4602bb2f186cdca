// Which kernel runs a forward on a GPU.
#pragma once

#include <algorithm>

#include "attention/cuda/params.h"
#include "attention/cuda/tile_sizes.h"

namespace vitkernels {

enum class ForwardPath {
  kGeneral,  // forward.cu: everything
  kPlain,    // forward_plain.cu: 16-bit elements, all queries see all keys, at most one dense bias
};

// Kernels with 32-bit offsets inside a tile.
inline constexpr int64_t kMaxPlainStride = std::numeric_limits<int32_t>::max() / kMaxPlainTile;

inline bool has_plain_rows(const TokenTensor& t) { return t.is_aligned && t.token_stride <= kMaxPlainStride; }

// Read two neighbours at a time, except where the head dimension leaves no registers for that.
inline bool has_plain_strides(const ScoreTerm& bias) {
  const ScoreStrides& s = bias.strides;
  const bool is_even = (s.batch | s.head | s.query) % 2 == 0 && reinterpret_cast<uintptr_t>(bias.data) % 8 == 0;
  return is_even && s.key == 1 && s.query <= kMaxPlainStride;
}

inline bool has_plain_score(const Score& score) {
  if (score.multiplier.data || score.key_bias.data || score.by_offset.any()) return false;
  // Without a bias the maximum is taken of the products, before the scale.
  return score.bias.data ? has_plain_strides(score.bias) : score.scale > 0.0 && !score.head_scale;
}

inline ForwardPath forward_path(const AttentionCudaParams& p) {
  const Problem& problem = p.problem;
  const bool is_plain = problem.dtype != DType::kFloat32 && std::max(problem.head_dim, problem.value_dim) <= 128 &&
                        !p.packing && !p.head_map.kv_head_of && !problem.axis.is_causal && problem.num_keys() > 0 &&
                        has_plain_rows(problem.query) && has_plain_rows(problem.key) && has_plain_rows(problem.value) &&
                        has_plain_score(problem.score);
  return is_plain ? ForwardPath::kPlain : ForwardPath::kGeneral;
}

}  // namespace vitkernels
