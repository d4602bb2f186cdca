#include "attention/op/backward_launches_cuda.h"

#include "attention/op/sums_in_parts_cuda.h"

namespace vitkernels {

BackwardLaunches::BackwardLaunches(const Checker& checker, const AttentionArguments& args,
                                   const ScoreFields<bool>& needed)
    : checker_(checker), args_(args), needed_(needed), is_empty_(args.query.numel() == 0 || args.key.numel() == 0) {
  if (!is_empty_) device_.emplace(args.query);
}

Tensor BackwardLaunches::gradient_of(const Tensor& t) const {
  return is_empty_ ? zeros_as(t, sizes_of(t), t.scalar_type()) : empty_as(t, sizes_of(t), t.scalar_type());
}

OptionalTensor BackwardLaunches::sum(const AttentionBackwardCudaParams& params, Side owner, const Tensor* logit_grads,
                                     const Tensor* probs, bool needs_dots) const {
  if (is_empty_) return {};
  OwnedSums sums;
  if (logit_grads) sums.logit_grads = {.tensor = token_tensor(*logit_grads), .size = logit_grads->numel()};
  if (probs) sums.probs = {.tensor = token_tensor(*probs), .size = probs->numel()};
  sums.splits = attention_backward_splits(params, sums, owner);
  const auto floats = [&](std::vector<int64_t> sizes) { return empty_as(args_.query, sizes, ScalarType::Float); };
  const int64_t splits = sums.splits > 1 ? sums.splits : 0;
  const Tensor logit_parts = floats({splits, sums.logit_grads.size}), prob_parts = floats({splits, sums.probs.size});
  if (splits > 0) {
    if (logit_grads) sums.logit_grads.parts = static_cast<float*>(logit_parts.mutable_data_ptr());
    if (probs) sums.probs.parts = static_cast<float*>(prob_parts.mutable_data_ptr());
  }
  OptionalTensor dots;
  if (needs_dots) {
    dots = floats({attention_backward_dot_parts(params, sums), params.num_rows(), params.heads});
    sums.dots = static_cast<float*>(dots->mutable_data_ptr());
  }
  check(launch_attention_backward(params, sums, owner, stream()));
  for (const SumTarget& target : {sums.logit_grads, sums.probs}) {
    if (target.parts) check(launch_sum_splits(target, splits, params.dtype, stream()));
  }
  return dots;
}

ScoreFields<OptionalTensor> BackwardLaunches::sum_queries(const AttentionBackwardCudaParams& params,
                                                          const Tensor& grad_query) const {
  const ScoreFields<OptionalTensor>& given = args_.score.terms;
  ScoreFields<OptionalTensor> grads;
  const OptionalTensor dots = sum(params, Side::kQueries, &grad_query, nullptr, needed_.head_scale);
  if (needed_.head_scale) grads.head_scale = gradient_of(*given.head_scale);
  if (dots) {
    check(launch_sum_rows({.rows = static_cast<const float*>(dots->const_data_ptr()),
                           .parts = dots->size(0),
                           .batch = params.is_packed() ? 1 : params.batch,
                           .queries = params.is_packed() ? params.packed_queries : params.num_queries(),
                           .heads = params.heads,
                           .weight = params.query_weight,
                           .weight_strides = params.weight_strides,
                           .factor = params.score.scale,
                           .strides = {.head = 1},
                           .sums = static_cast<float*>(grads.head_scale->mutable_data_ptr())},
                          stream()));
  }
  if (needed_.bias) grads.bias = term(params, *given.bias, TermFactor::kBias, 4);
  if (needed_.key_bias) grads.key_bias = term(params, *given.key_bias, TermFactor::kBias, 3);
  if (needed_.multiplier) grads.multiplier = term(params, *given.multiplier, TermFactor::kMultiplier, 4);
  return grads;
}

Tensor BackwardLaunches::term(const AttentionBackwardCudaParams& params, const Tensor& tensor, TermFactor factor,
                              int64_t rank) const {
  if (is_empty_) return gradient_of(tensor);
  const ScoreStrides strides = score_strides(tensor, rank, true);
  const SumsInParts sums(tensor, parts_of_term(params, strides, tensor.numel()), tensor.numel(),
                         SumsInParts::Start::kAnything);
  check(launch_attention_backward_term(params, {factor, strides, sums.sums()}, stream()));
  check(sums.add(stream()));
  return sums.gradient();
}

}  // namespace vitkernels
