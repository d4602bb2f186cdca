// Params of the linear attention kernels. Plain data, no torch.
//
// The state of keys and values is [head_dim, value_dim + 1]: the sum of phi(k)^T v, and in its last column that of
// phi(k). A query reads it with phi(q), and divides by what it finds in the last column.
#pragma once

#include "common/dtype.h"
#include "common/token_tensor.h"

namespace vitkernels {

// phi, element by element, but for the focused map: u^p |u| / |u^p| with u = relu(x) + 1e-6 and norms of rows.
enum class FeatureMap : int32_t { kIdentity, kRelu, kElu, kExp, kFocused };

inline constexpr int64_t kNumFeatureMaps = 5, kMaxFocusPower = 16;

struct LinearProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, num_queries = 0, num_keys = 0, head_dim = 0, value_dim = 0;
  FeatureMap feature_map = FeatureMap::kIdentity;
  int64_t power = 3;       // of the focused map
  bool normalizes = true;  // divides by phi(q) . sum of phi(k) + eps
  double eps = 0.0, scale = 1.0;
  double residual = 0.0;  // times the token's own value, added to the output
  TokenTensor query, key, value;

  VK_HOST_DEVICE int64_t heads_per_kv_head() const { return heads / kv_heads; }
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

}  // namespace vitkernels
