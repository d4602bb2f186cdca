#include "attention/op/backward_launches_cuda.h"

#include "attention/op/partial_sums_cuda.h"

namespace vitkernels {

BackwardLaunches::BackwardLaunches(const Checker& checker, const AttentionArguments& args,
                                   const ScoreFields<bool>& needed)
    : checker_(checker), args_(args), needed_(needed), is_empty_(args.query.numel() == 0 || args.key.numel() == 0) {
  if (!is_empty_) device_.emplace(args.query);
}

Tensor BackwardLaunches::gradient_of(const Tensor& t) const { return is_empty_ ? zeros_as(t) : empty_as(t); }

OptionalTensor BackwardLaunches::launch(const AttentionBackwardCudaParams& params, Side owner, OwnedGrads grads,
                                        const Tensor* logit_grads, const Tensor* probs, bool needs_dots) const {
  if (is_empty_) return {};
  if (logit_grads) grads.logit_grads = token_tensor(*logit_grads);
  if (probs) grads.probs = token_tensor(*probs);
  grads.splits = attention_backward_splits(params, grads, owner);
  std::vector<PartialSumsOwner> owners;
  const auto parts_of = [&](const Tensor* grad) {
    return grad ? owners.emplace_back(*grad, grads.splits, grad->numel()).parts() : PartialSums{};
  };
  grads.logit_grad_parts = parts_of(logit_grads), grads.prob_parts = parts_of(probs);
  OptionalTensor dots;
  if (needs_dots) {
    const int64_t parts = attention_backward_dot_parts(params, grads), rows = params.forward.num_rows();
    dots = empty_as(args_.query, {parts, rows, args_.heads}, ScalarType::Float);
    grads.dots = dots_of(*dots);
  }
  check(launch_attention_backward(params, grads, owner, stream()));
  for (const PartialSumsOwner& sums : owners) check(sums.add(args_.dtype, stream()));
  return dots;
}

PartialSums BackwardLaunches::dots_of(const Tensor& dots) {
  return {static_cast<float*>(dots.mutable_data_ptr()), dots.size(0), dots.size(1) * dots.size(2)};
}

OptionalTensor BackwardLaunches::sum_queries(const AttentionBackwardCudaParams& params,
                                             const Tensor& grad_query) const {
  const OptionalTensor dots = sum(params, Side::kQueries, &grad_query, nullptr, needed_.head_scale);
  if (!needed_.head_scale) return {};
  const Tensor grad = gradient_of(*args_.score.terms.head_scale);
  if (dots) {
    const int64_t batch = params.forward.packing ? 1 : args_.batch;
    check(launch_row_reduction({.rows = dots_of(*dots),
                                .batch = batch,
                                .queries = params.forward.num_rows() / batch,
                                .heads = args_.heads,
                                .weight = params.query_weight,
                                .weight_strides = params.weight_strides,
                                .factor = params.forward.problem.score.scale.as<double>(),
                                .strides = {.head = 1},
                                .out = static_cast<float*>(grad.mutable_data_ptr())},
                               stream()));
  }
  return grad;
}

void BackwardLaunches::sum_terms(const AttentionBackwardCudaParams& params, ScoreFields<OptionalTensor>& grads) const {
  for_each_broadcast_term(
      [&](const char*, Broadcast to, bool is_needed, const OptionalTensor& tensor, OptionalTensor& grad) {
        if (is_needed) grad = term(params, *tensor, to);
      },
      needed_, args_.score.terms, grads);
}

Tensor BackwardLaunches::term(const AttentionBackwardCudaParams& params, const Tensor& tensor, Broadcast to) const {
  if (is_empty_) return gradient_of(tensor);
  const TermFactor factor = to.is_multiplier ? TermFactor::kMultiplier : TermFactor::kBias;
  const Tensor grad = gradient_of(tensor);
  sum_term(params, factor, score_strides(tensor, to.rank, true), grad);
  return grad;
}

Tensor BackwardLaunches::logit_grads_of_batch(const AttentionBackwardCudaParams& params) const {
  const int64_t queries = params.forward.problem.num_queries(), keys = params.forward.problem.num_keys();
  const Tensor sum = empty_as(args_.query, {args_.heads, queries, keys}, ScalarType::Float);
  sum_term(params, TermFactor::kBias, {.head = queries * keys, .query = keys, .key = 1}, sum);
  return sum;
}

void BackwardLaunches::sum_term(const AttentionBackwardCudaParams& params, TermFactor factor,
                                const ScoreStrides& strides, const Tensor& to) const {
  const PartialSumsOwner sums(to, parts_of_term(params, strides, to.numel()), to.numel());
  check(launch_attention_backward_term(params, {factor, strides, sums.sums()}, stream()));
  check(sums.add(DType::kFloat32, stream()));
}

}  // namespace vitkernels
