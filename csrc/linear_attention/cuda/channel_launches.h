// Launches of the channel attention kernels on a GPU. Plain data, no torch.
//
// A channel attention is a linear one with another state. A pass leaves the products of the channels of query and key, in
// parts; small kernels make weights of these; and the values read the weights as the queries of linear attention read a
// state without a denominator, and leave the gradient of the weights as those leave that of the state.
#pragma once

#include "linear_attention/channel.h"
#include "linear_attention/cuda/launches.h"

namespace vitkernels {

// Matrices of a pair are [d + 1, dv + 1] as the state is, or, transposed, [dv, d + 1] as linear attention's states are,
// with zeros in the last column.
struct ChannelWeightsParams {
  ChannelProblem problem;
  const float* sums = nullptr;  // [pairs, d + 1, dv + 1]: products, and squares of channels; the state if that is null
  float* state = nullptr;       // [pairs, d + 1, dv + 1]
  float* weights = nullptr;     // [pairs, dv, d + 1]
};

struct ChannelWeightsGradParams {
  ChannelProblem problem;
  const float* state = nullptr;         // [pairs, d + 1, dv + 1]
  const float* grad_state = nullptr;    // likewise, or null
  const float* grad_weights = nullptr;  // [pairs, dv, d + 1]
  float* grads = nullptr;               // as in ChannelTokensParams
  float* grad_scale = nullptr;          // [batch, heads], or null
};

// grads [pairs, d + 1, dv + 1]: the gradient of the products, over the norms; in the last column and row, how much of
// itself the gradient of a channel loses.
struct ChannelTokensParams {
  ChannelProblem problem;
  const float* grads = nullptr;
  TokenTensor grad_query, grad_key;
};

// `splits` are linear_blocks_of_pair(), `parts` are [splits, pairs] of channel_part().
template <DType kDType>
struct ChannelLaunches {
  static cudaError_t sum(const ChannelProblem& problem, bool allow_tf32, cudaStream_t stream);
  static cudaError_t grad(const ChannelTokensParams& params, bool allow_tf32, cudaStream_t stream);
};

cudaError_t launch_channel_weights(const ChannelWeightsParams& params, cudaStream_t stream);
cudaError_t launch_channel_weights_grad(const ChannelWeightsGradParams& params, cudaStream_t stream);
// grad_head_scale [heads] = the problem's scale times the sum of of_pairs [batch, heads] over the batch.
cudaError_t launch_channel_scale_sum(const ChannelProblem& problem, const float* of_pairs, float* grad_head_scale,
                                     cudaStream_t stream);

// The squares of key's channels are one more row of products, those of query's are the sums of features.
constexpr LinearPart channel_part(const ChannelProblem& p) { return {p.head_dim + 1, p.value_dim}; }

// A linear attention of the same heads without a denominator; its operands are for the caller.
constexpr LinearProblem linear_problem(const ChannelProblem& p, int64_t head_dim, int64_t value_dim) {
  LinearProblem linear;
  linear.dtype = p.dtype;
  linear.batch = p.batch, linear.heads = p.heads, linear.kv_heads = p.heads;
  linear.head_dim = head_dim, linear.value_dim = value_dim;
  linear.normalizes = false;
  return linear;
}

}  // namespace vitkernels
