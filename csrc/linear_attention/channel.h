// Params of channel attention. Plain data, no torch.
//
// The state of a (batch, head) is [head_dim + 1, value_dim + 1]: the products of query's and key's channels over the
// tokens, of unit channels where channels are normalized, and in the last column and row the channels' norms.
#pragma once

#include "common/dtype.h"
#include "common/token_tensor.h"

namespace vitkernels {

// Few (batch, head) pairs: the tokens are summed in splits, then read in tiles. Many: each pair is one task.
enum class ChannelStage : int32_t { kAll, kSum, kRead };

// out[m, c] = sum over c' of softmax(scale sum over n of q[n, c] k[n, c'])[c'] v[m, c'].
struct ChannelProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, num_tokens = 0, num_values = 0, head_dim = 0, value_dim = 0;
  bool normalizes = false;  // channels of query and key, over the tokens
  double scale = 1.0;
  const void* head_scale = nullptr;  // [heads], a second factor; or null
  TokenTensor query, key, value;
  ChannelStage stage = ChannelStage::kAll;
  int64_t splits = 1;     // of what kSum adds up
  void* parts = nullptr;  // its partial sums

  VK_HOST_DEVICE int64_t num_pairs() const { return batch * heads; }
  VK_HOST_DEVICE int64_t state_size() const { return (head_dim + 1) * (value_dim + 1); }
};

// kSum adds up the tokens of query and key; kRead reads the weights with those of value.
struct ChannelParams {
  ChannelProblem problem;
  void* state = nullptr;
  TokenTensor out;

  DType element_type() const { return problem.dtype; }
};

// kSum makes the gradient of value and adds up that of the weights; kRead makes those of query and key.
struct ChannelGradParams {
  ChannelProblem problem;
  const void* state = nullptr;
  const void* grad_state = nullptr;  // of who reads the state; or null
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  void* grad_scale = nullptr;  // [batch, heads], of the factor on a pair's products

  DType element_type() const { return problem.dtype; }
};

}  // namespace vitkernels
