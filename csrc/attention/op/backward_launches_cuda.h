// The backward kernels that an operator launches on a GPU, with the memory that these need.
#pragma once

#include "attention/op/arguments_cuda.h"
#include "attention/op/backward_arguments.h"
#include "cuda/device.h"

namespace vitkernels {

// Gradients of score terms; empty ones where none was asked for.
struct TermGradients {
  Tensor head_scale, bias, key_bias, multiplier;
};

// Where there is nothing to sum, nothing is launched and all gradients are zero.
class BackwardLaunches {
 public:
  BackwardLaunches(const Checker& checker, const AttentionArguments& args, const NeededGradients& needed);

  bool is_empty() const { return is_empty_; }
  cudaStream_t stream() const { return device_->stream(); }
  void check(cudaError_t error) const { check_cuda(checker_, error); }

  // Room for sums in the shape of `t`.
  Tensor gradient_of(const Tensor& t) const;
  // A new one each: outputs must not alias.
  Tensor none() const { return none_as(args_.query, ScalarType::Float); }

  // Sums for each token of a side; what is null is not wanted. Returns the dots, if asked for: [parts, rows, heads].
  OptionalTensor sum(const AttentionBackwardCudaParams& params, Side owner, const Tensor* logit_grads,
                     const Tensor* probs, bool needs_dots = false) const;
  // dQ and all gradients that reach their tensors through the logits.
  TermGradients sum_queries(const AttentionBackwardCudaParams& params, const Tensor& grad_query) const;

 private:
  Tensor term(const AttentionBackwardCudaParams& params, const OptionalTensor& tensor, bool is_needed,
              TermFactor factor, int64_t rank) const;

  const Checker& checker_;
  const AttentionArguments& args_;
  const NeededGradients& needed_;
  bool is_empty_;
  std::optional<OnDevice> device_;
};

}  // namespace vitkernels
