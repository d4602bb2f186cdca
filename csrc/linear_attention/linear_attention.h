// Params of the linear attention kernels. Plain data, no torch.
//
// The state of keys and values is [head_dim, value_dim + 1]: the sum of phi(k)^T v, and in its last column that of
// phi(k). A query reads it with phi(q), and divides by what it finds in the last column.
#pragma once

#include "common/dtype.h"
#include "common/integers.h"
#include "common/token_tensor.h"

namespace vitkernels {

// phi, element by element, but for the focused map: u^p |u| / |u^p| with u = relu(x) + 1e-6 and norms of rows.
enum class FeatureMap : int32_t { kIdentity, kRelu, kElu, kExp, kFocused };

inline constexpr int64_t kNumFeatureMaps = 5, kMaxFocusPower = 16;

struct LinearProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  int64_t num_queries = 0, num_keys = 0;  // of a batch, or of the longest of packed sequences
  FeatureMap feature_map = FeatureMap::kIdentity;
  int64_t power = 3;       // of the focused map
  bool normalizes = true;  // divides by phi(q) . sum of phi(k) + eps
  double eps = 0.0, scale = 1.0;
  double residual = 0.0;  // times the token's own value, added to the output
  TokenTensor query, key, value;
  Integers head_map;                            // [heads], or absent: equal groups
  Integers cu_seqlens_q, cu_seqlens_k;          // [batch + 1], or absent: the batch is not packed
  int64_t packed_queries = 0, packed_keys = 0;  // tokens of packed tensors

  // The tokens of a batch along the token axis. Batch strides are zero where these do not begin with 0.
  VK_HOST_DEVICE Range queries(int64_t b) const {
    return cu_seqlens_q ? packed_tokens(cu_seqlens_q, b, num_queries, packed_queries) : Range{0, num_queries};
  }
  VK_HOST_DEVICE Range keys(int64_t b) const {
    return cu_seqlens_k ? packed_tokens(cu_seqlens_k, b, num_keys, packed_keys) : Range{0, num_keys};
  }

  VK_HOST_DEVICE int64_t kv_head(int64_t head) const { return kv_head_of(head_map, head, heads, kv_heads); }
  // Among which are the heads that read a kv head.
  VK_HOST_DEVICE Range candidates(int64_t kv_head) const {
    const int64_t group = heads / kv_heads;
    return head_map ? Range{0, heads} : Range{kv_head * group, (kv_head + 1) * group};
  }

  VK_HOST_DEVICE int64_t state_size() const { return head_dim * (value_dim + 1); }
  DType element_type() const { return dtype; }
};

// Tasks are (batch, kv head, split of the keys); partial sums of the splits are added in order.
struct LinearStateParams {
  LinearProblem problem;
  int64_t splits = 1;
  void* parts = nullptr;
  void* state = nullptr;  // [batch, kv_heads, head_dim, value_dim + 1]

  DType element_type() const { return problem.dtype; }
  int64_t num_tasks() const { return problem.batch * problem.kv_heads * splits; }
};

// Tasks are (batch, head, tile of queries).
struct LinearOutputParams {
  LinearProblem problem;
  const void* state = nullptr;
  TokenTensor out;

  DType element_type() const { return problem.dtype; }
};

// Tasks as of the state, over splits of the queries: the gradients of the queries and of the state.
struct LinearGradQueryParams {
  LinearProblem problem;
  const void* state = nullptr;
  TokenTensor grad_out, grad_query;
  int64_t splits = 1;
  void* parts = nullptr;
  void* grad_state = nullptr;

  DType element_type() const { return problem.dtype; }
  int64_t num_tasks() const { return problem.batch * problem.kv_heads * splits; }
};

// Tasks are (batch, kv head, tile of keys).
struct LinearGradKeyParams {
  LinearProblem problem;
  const void* grad_state = nullptr;
  TokenTensor grad_out, grad_key, grad_value;

  DType element_type() const { return problem.dtype; }
};

// Without a state, of few queries or keys. Tasks are (batch, kv head).
struct LinearQuadraticParams {
  LinearProblem problem;
  TokenTensor out;

  DType element_type() const { return problem.dtype; }
};
struct LinearQuadraticGradParams {
  LinearProblem problem;
  TokenTensor grad_out, grad_query, grad_key, grad_value;

  DType element_type() const { return problem.dtype; }
};

}  // namespace vitkernels
