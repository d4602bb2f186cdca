// Which kernel runs a forward on a GPU.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/cuda/params.h"
#include "attention/cuda/tile_sizes.h"

namespace vitkernels {

enum class ForwardPath {
  kGeneral,   // forward.cu: everything
  kPlain,     // forward_plain.cu: 16-bit elements, all queries see all keys, at most one dense bias
  kResident,  // forward_resident.cu: the same, from 64 queries, with up to 256 keys and 64 columns
};

// Offsets inside a tile of a bias, and between rows that a thread copies, have 32 bits.
inline constexpr int64_t kMaxPlainStride = std::numeric_limits<int32_t>::max() / kMaxPlainTile;
// Tokens have, too, and the tiles of a side times the splits.
inline constexpr int64_t kMaxPlainTokens = int64_t(1) << 27;
static_assert(kMaxPlainTokens / kMinPlainTile * kBlocksOfLargeGpu <= std::numeric_limits<int32_t>::max());
// Of the bias that takes the place of a score's additive terms: 64 MB. Longer sequences keep to linear memory.
inline constexpr int64_t kMaxBiasElements = int64_t(1) << 24;

inline bool has_plain_rows(const TokenTensor& t) { return t.is_aligned && t.token_stride <= kMaxPlainStride; }

inline bool has_plain_operands(const AttentionCudaParams& p) {
  const Problem& problem = p.problem;
  return problem.dtype != DType::kFloat32 && std::max(problem.head_dim, problem.value_dim) <= 128 && !p.packing &&
         !p.head_map.kv_head_of && !problem.axis.is_causal && problem.num_keys() > 0 &&
         std::max(problem.num_queries(), problem.num_keys()) <= kMaxPlainTokens && has_plain_rows(problem.query) &&
         has_plain_rows(problem.key) && has_plain_rows(problem.value);
}

// A bias is read two elements at a time.
inline bool is_plain_bias(const ScoreTerm& bias) {
  const ScoreStrides& s = bias.strides;
  const bool is_even = (s.batch | s.head | s.query) % 2 == 0 && reinterpret_cast<uintptr_t>(bias.data) % 8 == 0;
  return is_even && s.key == 1 && s.query <= kMaxPlainStride;
}

inline bool has_plain_score(const Score& score) {
  if (score.multiplier.data || score.key_bias.data || score.by_offset.any()) return false;
  if (score.bias.data) return is_plain_bias(score.bias);
  // Without a bias the maximum is taken of the products, before a scale to logits to the base 2.
  const float scale = score.scale.as<float>();
  return scale > 0.0f && scale <= std::numeric_limits<float>::max() / 2 && !score.head_scale;
}

inline ForwardPath forward_path(const AttentionCudaParams& p) {
  const Problem& problem = p.problem;
  if (!has_plain_operands(p) || !has_plain_score(problem.score)) return ForwardPath::kGeneral;
  // A block with fewer queries is not worth its copy of all keys.
  const bool is_resident = problem.num_keys() <= kMaxResidentKeys && problem.num_queries() >= kMinResidentQueries &&
                           std::max(problem.head_dim, problem.value_dim) <= 64;
  return is_resident ? ForwardPath::kResident : ForwardPath::kPlain;
}

// The dense bias with which a call that cannot yet take the fast path should: the general kernel looks tables and
// relative logits up for each logit, and a bias that the batch shares is expanded for all of it. No pitch: there is
// none.
inline DenseBias wanted_bias(const AttentionCudaParams& p) {
  const Problem& problem = p.problem;
  const Score& score = problem.score;
  const OffsetTerms& by_offset = score.by_offset;
  const bool is_sum = !score.multiplier.data && !by_offset.multiplier.data &&
                      (score.bias.data || score.key_bias.data || by_offset.has_bias());
  if (!is_sum || !has_plain_operands(p) || has_plain_score(score)) return {};
  const bool by_query = by_offset.has_rel_pos();  // and so by batch and head
  const bool by_batch = by_query || score.bias.strides.batch != 0 || score.key_bias.strides.batch != 0;
  const bool by_head =
      by_query || score.bias.strides.head != 0 || score.key_bias.strides.head != 0 || by_offset.bias.head_stride != 0;
  const DenseBias bias{.batch = by_batch ? problem.batch : 1,
                       .heads = by_head ? problem.heads : 1,
                       .pitch = (problem.num_keys() + 7) / 8 * 8};  // rows begin at sectors of 32 bytes
  const bool is_small = bias.num_elements(problem) <= kMaxBiasElements && bias.pitch <= kMaxPlainStride;
  return is_small ? bias : DenseBias{};
}

}  // namespace vitkernels
