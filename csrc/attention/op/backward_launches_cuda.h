// The backward kernels that an operator launches on a GPU, and the memory that they need.
#pragma once

#include "attention/op/arguments_cuda.h"
#include "cuda/device.h"

namespace vitkernels {

// If there is nothing to sum, nothing is launched and all gradients are zero.
class BackwardLaunches {
 public:
  BackwardLaunches(const Checker& checker, const AttentionArguments& args, const ScoreFields<bool>& needed);

  bool is_empty() const { return is_empty_; }
  cudaStream_t stream() const { return device_->stream(); }
  void check(cudaError_t error) const { check_cuda(checker_, error); }

  // Memory for a gradient in the shape of `t`, zero if there is nothing to sum.
  Tensor gradient_of(const Tensor& t) const;

  // The gradients of each token of a side; null ones are not wanted. Returns the dots, if requested:
  // [parts, rows, heads].
  OptionalTensor sum(const AttentionBackwardCudaParams& params, Side owner, const Tensor* logit_grads,
                     const Tensor* probs, bool needs_dots = false) const;
  static PartialSums dots_of(const Tensor& dots);
  // dQ and the gradients of all terms except those by offset.
  ScoreFields<OptionalTensor> sum_queries(const AttentionBackwardCudaParams& params, const Tensor& grad_query) const;

 private:
  Tensor term(const AttentionBackwardCudaParams& params, const Tensor& tensor, Broadcast to) const;

  const Checker& checker_;
  const AttentionArguments& args_;
  const ScoreFields<bool>& needed_;
  bool is_empty_;
  std::optional<OnDevice> device_;
};

}  // namespace vitkernels
