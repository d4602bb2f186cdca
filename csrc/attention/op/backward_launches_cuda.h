// The backward kernels that an operator launches on a GPU, with the memory that these need.
#pragma once

#include "attention/op/arguments_cuda.h"
#include "cuda/device.h"

namespace vitkernels {

// Where there is nothing to sum, nothing is launched and all gradients are zero.
class BackwardLaunches {
 public:
  BackwardLaunches(const Checker& checker, const AttentionArguments& args, const ScoreFields<bool>& needed);

  bool is_empty() const { return is_empty_; }
  cudaStream_t stream() const { return device_->stream(); }
  void check(cudaError_t error) const { check_cuda(checker_, error); }

  // Room for sums in the shape of `t`.
  Tensor gradient_of(const Tensor& t) const;

  // Sums for each token of a side; what is null is not wanted. Returns the dots, if asked for: [parts, rows, heads].
  OptionalTensor sum(const AttentionBackwardCudaParams& params, Side owner, const Tensor* logit_grads,
                     const Tensor* probs, bool needs_dots = false) const;
  static PartialSums dots_of(const Tensor& dots);
  // dQ and the gradients of all terms but those by offset.
  ScoreFields<OptionalTensor> sum_queries(const AttentionBackwardCudaParams& params, const Tensor& grad_query) const;

 private:
  Tensor term(const AttentionBackwardCudaParams& params, const Tensor& tensor, TermFactor factor, int64_t rank) const;

  const Checker& checker_;
  const AttentionArguments& args_;
  const ScoreFields<bool>& needed_;
  bool is_empty_;
  std::optional<OnDevice> device_;
};

}  // namespace vitkernels
