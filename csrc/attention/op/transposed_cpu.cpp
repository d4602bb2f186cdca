// The operators vitkernels::attention_transposed and vitkernels::attention_transposed_backward on the CPU.
#include "attention/cpu/tile_sizes.h"
#include "attention/op/logit_gradients.h"
#include "attention/op/transposed_arguments.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

void fill(const TransposedArguments& args, AttentionParams& params) {
  args.attention.fill(params);
  params.problem.value = token_tensor(args.value);
  params.problem.value_dim = args.value.size(3);
  params.lse = const_cast<void*>(args.lse.const_data_ptr());
}

QueryWeight weight_of(const TransposedArguments& args) {
  if (!args.query_weight) return {};
  return {args.query_weight->const_data_ptr(), weight_strides(*args.query_weight, false)};
}

void attention_transposed(Call& call) {
  const TransposedArguments args(call.checker, take_transposed(call));
  const Tensor& query = args.attention.query;
  const Tensor out = empty_as(query, args.out_sizes(), query.scalar_type());
  if (out.numel() == 0) return call.give(out, "");
  AttentionTransposedParams params{.attention = {}, .weight = weight_of(args)};
  fill(args, params.attention);
  params.attention.out = token_tensor(out);
  const Problem& problem = params.attention.problem;
  const int64_t tasks = problem.batch * problem.heads * transposed_keys(problem).count;
  const int64_t of_kv_head = std::max<int64_t>(problem.heads / std::max<int64_t>(problem.kv_heads, 1), 1);
  run_kernel(kernel<AttentionTransposedParams>(), params, tasks, of_kv_head, query);
  call.give(out, "");
}

// d(query_weight) in its own shape, reduced from that of each row [B, Nq, heads], in double and in order.
Tensor sum_query_weight(const Tensor& weight, const Tensor& of_rows) {
  const Tensor grad = zeros_as(weight, sizes_of(weight), ScalarType::Double);
  const ScoreStrides strides = weight_strides(weight, true);
  double* sums = static_cast<double*>(grad.mutable_data_ptr());
  dispatch_statistics(of_rows, [&]<class T>(T) {
    const T* row = static_cast<const T*>(of_rows.const_data_ptr());
    for (int64_t b = 0; b < of_rows.size(0); ++b) {
      for (int64_t query = 0; query < of_rows.size(1); ++query) {
        for (int64_t h = 0; h < of_rows.size(2); ++h) sums[strides.offset(b, h, query, 0)] += *row++;
      }
    }
  });
  return torch::stable::to(grad, weight.scalar_type());
}

void attention_transposed_backward(Call& call) {
  const Tensor grad_out = call.take<Tensor>("grad_out");
  const TransposedCall forward = take_transposed(call);
  const bool needs_weight = call.take<bool>("need_query_weight") && forward.query_weight;
  const ScoreFields<bool> needed = take_needed(call, forward.attention.score);
  const TransposedArguments args(call.checker, forward);
  args.check_grad_out(call.checker, grad_out);
  const Tensor out_gradient = with_unit_last_stride(grad_out);

  const Tensor &query = args.attention.query, &value = args.value, &lse = args.lse;
  const Tensor grad_value = empty_as(value), grad_lse = empty_as(lse), grad_row_weight = empty_as(lse);
  AttentionTransposedBackwardParams params{.attention = {}, .weight = weight_of(args)};
  AttentionBackwardParams& attention = params.attention;
  fill(args, attention.forward);
  attention.grad_out = token_tensor(out_gradient);
  attention.grad_value = token_tensor(grad_value);
  params.grad_row_lse = grad_lse.mutable_data_ptr();
  params.grad_row_weight = grad_row_weight.mutable_data_ptr();
  LogitGradients grads(args.attention, needed, attention, false);
  const Kernel<AttentionTransposedBackwardParams>& kernel = vitkernels::kernel<AttentionTransposedBackwardParams>();
  const int64_t part_elements = kernel.parts(params) / int64_t(lse.element_size());
  const Tensor value_parts = zeros_as(lse, {part_elements}, lse.scalar_type());
  params.grad_value_parts = value_parts.mutable_data_ptr();

  // An empty tensor may have any batch size, however large.
  const bool is_empty = query.numel() == 0 && args.attention.key.numel() == 0;
  if (attention.num_tasks() > 0 && !is_empty) run_kernel(kernel, params, attention.num_tasks(), 1, query);
  if (query.numel() > 0) {
    torch::stable::parallel_for(0, args.attention.batch * args.attention.heads, 1,
                                [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
  }
  grads.finish(args.attention, attention);
  call.give(grads.query, "grad_query");
  call.give(grads.key, "grad_key");
  call.give(grad_value, "grad_value_q");
  call.give(grad_lse, "grad_lse");
  call.give(needs_weight ? sum_query_weight(*args.query_weight, grad_row_weight) : none_like(lse), "grad_query_weight");
  give_gradients(call, grads.terms, lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("attention_transposed", &boxed<"attention_transposed", attention_transposed>);
  m.impl("attention_transposed_backward", &boxed<"attention_transposed_backward", attention_transposed_backward>);
}
