// From the tensors of an attention operator to the Params of its kernels, with all checks.
#pragma once

#include "attention/attention.h"
#include "common/check.h"

namespace vitkernels {

struct ScoreArguments {
  double scale;
  OptionalTensor head_scale, bias, key_bias, multiplier;
};

// Owns what Params points to.
struct AttentionArguments {
  Tensor query, key, value;
  ScoreArguments score;
  std::vector<int64_t> kv_head_of;

  AttentionArguments(const Checker& checker, const Tensor& query, const Tensor& key, const Tensor& value,
                     ScoreArguments score, const OptionalTensor& head_map, bool is_causal);

  void fill(AttentionParams& params) const;

  std::vector<int64_t> out_sizes() const { return {batch, num_queries, heads, value_dim}; }
  std::vector<int64_t> lse_sizes() const { return {batch, num_queries, heads}; }

  DType dtype;
  bool is_causal;
  int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim, value_dim;
};

TokenTensor token_tensor(const Tensor& t);

// The gradient of a score term: zero, in the term's own shape.
Tensor attach_gradient(ScoreTerm& term, const Tensor& tensor, int64_t rank);

}  // namespace vitkernels
