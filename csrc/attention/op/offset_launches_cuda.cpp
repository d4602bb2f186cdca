#include "attention/op/offset_launches_cuda.h"

#include "attention/op/partial_sums_cuda.h"

namespace vitkernels {

OptionalTensor launch_relative_logits(const Checker& checker, const AttentionArguments& args,
                                      AttentionCudaParams& params, cudaStream_t stream) {
  const OffsetTerms& terms = params.problem.score.by_offset;
  if (!terms.has_rel_pos()) return {};
  DeviceRelativeLogits relative;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    relative.first[axis] = relative.width;
    if (terms.rel_pos[axis].data) relative.width += int(terms.grid.size[axis]);
  }
  relative.head_stride = terms.grid.num_tokens() * relative.width;
  relative.batch_stride = args.heads * relative.head_stride;
  const Tensor logits = empty_as(args.query, {args.batch, relative.batch_stride}, ScalarType::Float);
  relative.data = static_cast<const float*>(logits.const_data_ptr());
  params.problem.score.by_offset.relative = relative;
  check_cuda(checker, launch_relative_logits(params, static_cast<float*>(logits.mutable_data_ptr()), stream));
  return logits;
}

DeviceOffsetGradients::DeviceOffsetGradients(const BackwardLaunches& launches, const AttentionArguments& args,
                                             const ScoreFields<bool>& needed, AttentionBackwardCudaParams& params)
    : launches_(launches), args_(args), needed_(needed) {
  const OffsetTerms& terms = params.forward.problem.score.by_offset;
  if (!terms.has_rel_pos() || launches.is_empty()) return;
  relative_grads_ = zeros_as(args.query, {args.batch, terms.relative.batch_stride}, ScalarType::Float);
  relative_grad_query_ =
      empty_as(args.query, {args.batch, args.heads, terms.grid.num_tokens(), args.head_dim}, ScalarType::Float);
  params.relative_grad_query = static_cast<const float*>(relative_grad_query_->const_data_ptr());
}

void DeviceOffsetGradients::sum_relative(const AttentionBackwardCudaParams& params) const {
  if (!relative_grads_) return;
  float* grads = static_cast<float*>(relative_grads_->mutable_data_ptr());
  float* grad_query = static_cast<float*>(relative_grad_query_->mutable_data_ptr());
  launches_.check(launch_relative_logits_backward(params, grads, launches_.stream()));
  launches_.check(launch_relative_grad_query(params, grads, grad_query, launches_.stream()));
}

void DeviceOffsetGradients::compute(const AttentionBackwardCudaParams& params,
                                    ScoreFields<OptionalTensor>& grads) const {
  const ScoreFields<OptionalTensor>& given = args_.by_offset.from;
  if (needed_.bias_table) grads.bias_table = table(params, *given.bias_table, TermFactor::kBias);
  if (needed_.multiplier_table) {
    grads.multiplier_table = table(params, *given.multiplier_table, TermFactor::kMultiplierTable);
  }
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (needed_.rel_pos[axis]) grads.rel_pos[axis] = embedding(params, axis);
  }
}

Tensor DeviceOffsetGradients::table(const AttentionBackwardCudaParams& params, const Tensor& given,
                                    TermFactor factor) const {
  if (launches_.is_empty()) return launches_.gradient_of(given);
  const Problem& problem = params.forward.problem;
  const int64_t entries = problem.score.by_offset.grid.num_entries();
  if (params.logit_grads.data) {
    const Tensor of_batch = launches_.logit_grads_of_batch(params);
    const PartialSumsOwner sums(launches_.gradient_of(given), 1, args_.heads * entries);
    launches_.check(launch_attention_backward_table(problem, static_cast<const float*>(of_batch.const_data_ptr()),
                                                    sums.sums().data, launches_.stream()));
    launches_.check(sums.add(DType::kFloat32, launches_.stream()));
    return sums.gradient();
  }
  const PartialSumsOwner sums(zeros_as(given), parts_of_table(params), args_.heads * entries,
                              PartialSumsOwner::Start::kZero);
  launches_.check(launch_attention_backward_table(params, {factor, sums.sums()}, launches_.stream()));
  launches_.check(sums.add(DType::kFloat32, launches_.stream()));
  return sums.gradient();
}

Tensor DeviceOffsetGradients::embedding(const AttentionBackwardCudaParams& params, int axis) const {
  const Tensor& given = *args_.by_offset.from.rel_pos[axis];
  if (launches_.is_empty()) return launches_.gradient_of(given);
  const int64_t offsets = params.forward.problem.score.by_offset.grid.num_offsets(axis);
  const PartialSumsOwner sums(launches_.gradient_of(given), parts_of_embedding(params, axis),
                              args_.heads * offsets * args_.head_dim);
  const float* grads = static_cast<const float*>(relative_grads_->const_data_ptr());
  launches_.check(launch_relative_grad_embedding(params, {axis, grads, sums.sums()}, launches_.stream()));
  launches_.check(sums.add(DType::kFloat32, launches_.stream()));
  return sums.gradient();
}

}  // namespace vitkernels
