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
                     const Tensor* probs, bool needs_dots = false) const {
    return launch(params, owner, {}, logit_grads, probs, needs_dots);
  }
  // Those of both sides in one launch (BackwardPath::kResident).
  void sum_both(const AttentionBackwardCudaParams& params, const Tensor& query, const Tensor& key,
                const Tensor& value) const {
    OwnedGrads grads;
    grads.query_grads = token_tensor(query);
    launch(params, Side::kKeys, grads, &key, &value, false);
  }
  static PartialSums dots_of(const Tensor& dots);
  // dQ, which also returns the gradient of the scales of the heads.
  OptionalTensor sum_queries(const AttentionBackwardCudaParams& params, const Tensor& grad_query) const;
  // The gradients of the terms that broadcast to the logits.
  void sum_terms(const AttentionBackwardCudaParams& params, ScoreFields<OptionalTensor>& grads) const;
  // The logits' gradient, summed over the batch: [heads, queries, keys].
  Tensor logit_grads_of_batch(const AttentionBackwardCudaParams& params) const;

 private:
  OptionalTensor launch(const AttentionBackwardCudaParams& params, Side owner, OwnedGrads grads,
                        const Tensor* logit_grads, const Tensor* probs, bool needs_dots) const;
  Tensor term(const AttentionBackwardCudaParams& params, const Tensor& tensor, Broadcast to) const;
  void sum_term(const AttentionBackwardCudaParams& params, TermFactor factor, const ScoreStrides& strides,
                const Tensor& to) const;

  const Checker& checker_;
  const AttentionArguments& args_;
  const ScoreFields<bool>& needed_;
  bool is_empty_;
  std::optional<OnDevice> device_;
};

}  // namespace vitkernels
