// The operators vitkernels::attention_transposed and vitkernels::attention_transposed_backward on a GPU.
#include "attention/op/backward_launches_cuda.h"
#include "attention/op/transposed_arguments.h"

namespace vitkernels {
namespace {

// Params of the backward kernels with values per query; `out_gradient` is null in the forward.
AttentionBackwardCudaParams params_of(const TransposedArguments& args, const Tensor* out_gradient) {
  AttentionBackwardCudaParams params;
  fill_on_device(args.attention, args.value, args.lse, params.forward);
  params.forward.problem.value_dim = args.value.size(3);
  params.query_value = token_tensor(args.value);
  params.key_value_has_query_heads = true;
  if (out_gradient) params.key_value = token_tensor(*out_gradient);
  if (args.query_weight) {
    params.query_weight = static_cast<const float*>(args.query_weight->const_data_ptr());
    params.weight_strides = weight_strides(*args.query_weight, false);
  }
  return params;
}

void attention_transposed(Call& call) {
  const TransposedArguments args(call.checker, take_transposed(call), device_policy());
  const Tensor& query = args.attention.query;
  const ScoreFields<bool> needed;
  const BackwardLaunches launches(call.checker, args.attention, needed);
  const std::vector<int64_t> sizes = args.out_sizes();
  if (launches.is_empty()) return call.give(zeros_as(query, sizes, query.scalar_type()), "");
  const Tensor out = empty_as(query, sizes, query.scalar_type());
  launches.sum(params_of(args, nullptr), Side::kKeys, nullptr, &out);
  call.give(out, "");
}

// In order and in float64.
Tensor sum_query_weight(const BackwardLaunches& launches, const Tensor& weight, const Tensor& of_rows) {
  if (weight.numel() == of_rows.numel()) return torch::stable::view(of_rows, sizes_of(weight));
  Tensor grad = launches.gradient_of(weight);
  if (launches.is_empty()) return grad;
  launches.check(launch_row_reduction({.rows = {.data = static_cast<float*>(of_rows.mutable_data_ptr())},
                                       .batch = of_rows.size(0),
                                       .queries = of_rows.size(1),
                                       .heads = of_rows.size(2),
                                       .weight_strides = {},
                                       .strides = weight_strides(weight, true),
                                       .out = static_cast<float*>(grad.mutable_data_ptr())},
                                      launches.stream()));
  return grad;
}

void attention_transposed_backward(Call& call) {
  const Tensor grad_out = call.take<Tensor>("grad_out");
  const TransposedCall forward = take_transposed(call);
  const bool needs_weight = call.take<bool>("need_query_weight") && forward.query_weight;
  const ScoreFields<bool> needed = take_needed(call, forward.attention.score);
  const TransposedArguments args(call.checker, forward, device_policy());
  args.check_grad_out(call.checker, grad_out);
  const Tensor out_gradient = with_unit_last_stride(grad_out);
  const BackwardLaunches launches(call.checker, args.attention, needed);

  const Tensor &query = args.attention.query, &lse = args.lse;
  const Tensor grad_query = launches.gradient_of(query), grad_key = launches.gradient_of(args.attention.key);
  const Tensor grad_value = launches.gradient_of(args.value), grad_lse = launches.gradient_of(lse);
  const Tensor grad_row_weight = launches.gradient_of(lse);
  const AttentionBackwardCudaParams params = params_of(args, &out_gradient);
  launches.sum(params, Side::kKeys, &grad_key, nullptr);
  ScoreFields<OptionalTensor> terms;
  terms.head_scale = launches.sum_queries(params, grad_query);
  launches.sum_terms(params, terms);
  if (const OptionalTensor dots = launches.sum(params, Side::kQueries, nullptr, &grad_value, true)) {
    launches.check(launch_transposed_rows(params, BackwardLaunches::dots_of(*dots),
                                          static_cast<float*>(grad_row_weight.mutable_data_ptr()),
                                          static_cast<float*>(grad_lse.mutable_data_ptr()), launches.stream()));
  }
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value_q");
  call.give(grad_lse, "grad_lse");
  call.give(needs_weight ? sum_query_weight(launches, *args.query_weight, grad_row_weight) : none_like(lse),
            "grad_query_weight");
  give_gradients(call, terms, lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("attention_transposed", &boxed<"attention_transposed", attention_transposed>);
  m.impl("attention_transposed_backward", &boxed<"attention_transposed_backward", attention_transposed_backward>);
}
