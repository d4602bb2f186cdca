#include "attention/op/logit_gradients.h"

#include "attention/cpu/tile_sizes.h"

namespace vitkernels {
namespace {

// d(head_scale)[h] = scale * sum of q.dq over all queries, in double and in order.
Tensor sum_head_scale(const AttentionArguments& args, const Tensor& query_dot) {
  Tensor grad = empty_as(query_dot, {args.heads}, query_dot.scalar_type());
  const auto sum = [&]<class T>(T) {
    const T* dots = static_cast<const T*>(query_dot.const_data_ptr());  // [heads, rows]
    for (int64_t h = 0; h < args.heads; ++h) {
      double total = 0;
      for (int64_t i = 0; i < query_dot.size(1); ++i) total += *dots++;
      static_cast<T*>(grad.mutable_data_ptr())[h] = T(args.score.scale * total);
    }
  };
  if (args.dtype == DType::kFloat64) {
    sum(double{});
  } else {
    sum(float{});
  }
  return grad;
}

}  // namespace

LogitGradients::LogitGradients(const AttentionArguments& args, NeededGradients needed, AttentionBackwardParams& params)
    : query(empty_as(args.query, sizes_of(args.query), args.query.scalar_type())),
      key(empty_as(args.key, sizes_of(args.key), args.key.scalar_type())),
      grid_gradients(args.on_grid, needed.on_grid),
      needs_head_scale(needed.head_scale && args.score.head_scale) {
  const ScalarType statistics = statistics_type(args.dtype);
  const auto none = [&] { return none_as(args.query, statistics); };
  params.grad_query = token_tensor(query);
  params.grad_key = token_tensor(key);

  if (grid_gradients.any()) params.max_batch_groups = GridGradients::kParts;

  params.splits = 0;
  const auto attach = [&](ScoreTerm& term, const OptionalTensor& tensor, bool is_needed, int64_t rank) {
    if (!is_needed || !tensor) return none();
    const Tensor grad = attach_gradient(term, *tensor, rank, params);
    params.batch_is_shared |= term.grad_strides.batch == 0 && params.batch > 1;
    params.heads_are_shared |= term.grad_strides.head == 0 && params.heads > 1;
    // One value for all keys: the splits would write to the same place.
    if (term.grad_strides.key == 0) params.splits = 1;
    return grad;
  };
  bias = attach(params.score.bias, args.score.bias, needed.bias, 4);
  key_bias = attach(params.score.key_bias, args.score.key_bias, needed.key_bias, 3);
  multiplier = attach(params.score.multiplier, args.score.multiplier, needed.multiplier, 4);
  if (params.splits == 0) params.splits = backward_splits(params);
  grid_gradients.allocate(params.score.on_grid, params.heads, params.batch_groups() * params.splits, none());

  const int64_t element_size = args.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t part_elements = kernel<AttentionBackwardParams>().parts(params) / element_size;
  query_parts = zeros_as(args.query, {part_elements}, statistics);
  if (params.score.on_grid.has_rel_pos()) {
    relative_query_parts = zeros_as(args.query, {part_elements}, statistics);
    params.grad_rel_query_parts = relative_query_parts.mutable_data_ptr();
  }
  query_dot = needs_head_scale ? empty_as(args.query, {args.heads, params.num_rows()}, statistics) : none();
  params.grad_query_parts = query_parts.mutable_data_ptr();
  params.query_dot = needs_head_scale ? query_dot.mutable_data_ptr() : nullptr;
}

void LogitGradients::finish(const AttentionArguments& args, const AttentionBackwardParams& params) {
  if (args.query.numel() > 0) {
    torch::stable::parallel_for(0, args.batch * args.heads, 1, [&](int64_t begin, int64_t end) {
      kernel<AttentionBackwardParams>().finish(params, begin, end);
    });
  }
  const ScalarType statistics = statistics_type(args.dtype);
  for (Tensor* grad : {&bias, &key_bias, &multiplier}) *grad = torch::stable::to(*grad, statistics);
  on_grid = grid_gradients.finish(params.heads, none_as(args.query, statistics));
  head_scale = needs_head_scale ? sum_head_scale(args, query_dot) : none_as(args.query, statistics);
}

}  // namespace vitkernels
