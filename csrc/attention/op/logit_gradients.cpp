#include "attention/op/logit_gradients.h"

#include "attention/cpu/tile_sizes.h"

namespace vitkernels {
namespace {

// d(head_scale)[h] = scale * sum of q.dq over all queries, in double and in order.
Tensor sum_head_scale(const AttentionArguments& args, const Tensor& query_dot) {
  Tensor grad = empty_as(query_dot, {args.heads}, query_dot.scalar_type());
  dispatch_statistics(query_dot, [&]<class T>(T) {
    const T* dots = static_cast<const T*>(query_dot.const_data_ptr());  // [heads, rows]
    for (int64_t h = 0; h < args.heads; ++h) {
      double total = 0;
      for (int64_t i = 0; i < query_dot.size(1); ++i) total += *dots++;
      static_cast<T*>(grad.mutable_data_ptr())[h] = T(args.score.scale * total);
    }
  });
  return grad;
}

}  // namespace

LogitGradients::LogitGradients(const AttentionArguments& args, const ScoreFields<bool>& needed,
                               AttentionBackwardParams& params, bool stores_query_gradient)
    : query(empty_as(args.query)), key(empty_as(args.key)), offset_gradients(args.by_offset, needed) {
  const ScalarType statistics = statistics_type(args.dtype);
  Problem& problem = params.forward.problem;
  params.grad_query = token_tensor(query);
  params.grad_key = token_tensor(key);
  if (offset_gradients.any()) params.max_batch_groups = OffsetGradients::kParts;
  params.splits = 0;
  const auto attach = [&](const char*, Broadcast to, bool is_needed, const OptionalTensor& tensor, OptionalTensor& grad,
                          ScoreTerm& term) {
    if (!is_needed) return;
    grad = attach_gradient(term, *tensor, to.rank, problem);
    params.batch_is_shared |= term.grad_strides.batch == 0 && problem.batch > 1;
    params.heads_are_shared |= term.grad_strides.head == 0 && problem.heads > 1;
    // One value for all keys: the splits would write to the same element.
    if (term.grad_strides.key == 0) params.splits = 1;
  };
  for_each_broadcast_term(attach, needed, args.score.terms, terms, problem.score);
  if (params.splits == 0) params.splits = backward_splits(params);
  const int64_t parts = params.batch_groups() * params.splits;
  offset_gradients.allocate(problem.score.by_offset, problem.heads, parts, args.query);

  const int64_t element_size = args.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t part_elements = kernel<AttentionBackwardParams>().parts(params) / element_size;
  if (!stores_query_gradient || !has_one_key_tile(params)) {
    query_parts = zeros_as(args.query, {part_elements}, statistics);
    params.grad_query_parts = query_parts->mutable_data_ptr();
  }
  if (problem.score.by_offset.has_rel_pos()) {
    relative_query_parts = zeros_as(args.query, {part_elements}, statistics);
    params.grad_rel_query_parts = relative_query_parts->mutable_data_ptr();
  }
  if (needed.head_scale) {
    query_dot = empty_as(args.query, {args.heads, params.forward.num_rows()}, statistics);
    params.query_dot = query_dot->mutable_data_ptr();
  }
}

void LogitGradients::finish(const AttentionArguments& args, const AttentionBackwardParams& params) {
  if (args.query.numel() > 0) {
    torch::stable::parallel_for(0, args.batch * args.heads, 1, [&](int64_t begin, int64_t end) {
      kernel<AttentionBackwardParams>().finish(params, begin, end);
    });
  }
  const auto round = [&](const char*, Broadcast, OptionalTensor& grad) {
    if (grad) grad = torch::stable::to(*grad, statistics_type(args.dtype));
  };
  for_each_broadcast_term(round, terms);
  offset_gradients.finish(args.heads, terms);
  if (query_dot) terms.head_scale = sum_head_scale(args, *query_dot);
}

}  // namespace vitkernels
