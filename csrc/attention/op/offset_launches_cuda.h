// The terms by offset on a GPU: the kernels that an operator launches for them, and the memory that they need.
#pragma once

#include "attention/op/backward_launches_cuda.h"

namespace vitkernels {

// Computes the relative logits, if there are embeddings, and points `params` to them. The returned tensor owns them.
OptionalTensor launch_relative_logits(const Checker& checker, const AttentionArguments& args,
                                      AttentionCudaParams& params, cudaStream_t stream);

// The gradients of these terms. The other backward kernels' `delta` must have been computed.
class DeviceOffsetGradients {
 public:
  // Points `params` to the share of the query's gradient, which sum_relative computes.
  DeviceOffsetGradients(const BackwardLaunches& launches, const AttentionArguments& args,
                        const ScoreFields<bool>& needed, AttentionBackwardCudaParams& params);

  // Of the relative logits, if there are any. Where the main pass over the keys stores dS, it must have been launched.
  void sum_relative(const AttentionBackwardCudaParams& params) const;
  void compute(const AttentionBackwardCudaParams& params, ScoreFields<OptionalTensor>& grads) const;

 private:
  Tensor table(const AttentionBackwardCudaParams& params, const Tensor& given, TermFactor factor) const;
  Tensor embedding(const AttentionBackwardCudaParams& params, int axis) const;

  const BackwardLaunches& launches_;
  const AttentionArguments& args_;
  const ScoreFields<bool>& needed_;
  OptionalTensor relative_grads_, relative_grad_query_;
};

}  // namespace vitkernels
