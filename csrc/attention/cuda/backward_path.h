// Which kernels run a backward on a GPU.
#pragma once

#include "attention/cuda/forward_path.h"

namespace vitkernels {

enum class BackwardPath {
  kGeneral,   // backward.cu: everything
  kPlain,     // backward_plain_keys.cu, backward_plain_queries.cu: as the forward's
  kResident,  // backward_plain_keys.cu: a block owns all keys of a head
};

// Of a backward of attention.
inline bool has_plain_operands(const AttentionBackwardCudaParams& p) {
  const Problem& problem = p.forward.problem;
  return has_plain_operands(p.forward) && has_plain_rows(p.query_value) && !problem.score.head_scale &&
         !p.key_value_has_query_heads && !p.query_weight && problem.num_queries() > 0 &&
         QueryStatistics::num_pairs(problem) < (int64_t(1) << 30);
}

// With a score as the forward's paths take it. Operands of 32 columns and fewer take the kernels of 64 if there is a
// bias, and wider ones the general kernels: fewer instantiations.
inline BackwardPath backward_path(const AttentionBackwardCudaParams& p) {
  const Problem& problem = p.forward.problem;
  const int64_t dim = std::max(problem.head_dim, problem.value_dim), keys = problem.num_keys();
  const bool is_plain = has_plain_operands(p) && has_plain_score(problem.score);
  if (!is_plain || (problem.score.bias.data && dim > 64)) return BackwardPath::kGeneral;
  // With fewer keys, the plain kernels own all of a head, too, and none of their warps is idle. What reaches the
  // queries through relative logits is known after a pass over the keys.
  return dim <= 64 && !p.relative_grad_query && keys > plain_keys_tile(64).owned &&
                 keys <= resident_backward_tile().owned
             ? BackwardPath::kResident
             : BackwardPath::kPlain;
}

// As of the forward.
inline DenseBias wanted_bias(const AttentionBackwardCudaParams& p) {
  const Problem& problem = p.forward.problem;
  const bool is_of_fast_path = has_plain_operands(p) && std::max(problem.head_dim, problem.value_dim) <= 64;
  return is_of_fast_path ? wanted_bias(p.forward) : DenseBias{};
}

// Of the logits' gradient that the fast paths leave for the score terms: 256 MB, and for a table as much as twice
// beside it, the sum over the batch in float32. Without it, their kernels recompute it.
inline constexpr int64_t kMaxLogitGrads = int64_t(1) << 27;

}  // namespace vitkernels
