// The operators vitkernels::attention_transposed and vitkernels::attention_transposed_backward on a GPU.
#include "attention/op/backward_launches_cuda.h"
#include "attention/op/transposed_arguments.h"

namespace vitkernels {
namespace {

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A backward whose values are the queries'; `out_gradient` is null in the forward.
AttentionBackwardCudaParams params_of(const TransposedArguments& args, bool allow_tf32, const Tensor* out_gradient) {
  AttentionBackwardCudaParams params;
  fill_on_device(args.attention, args.value, args.lse, params);
  params.allow_tf32 = allow_tf32;
  params.value_dim = args.value.size(3);
  params.query_value = token_tensor(args.value);
  params.key_value_has_query_heads = true;
  if (out_gradient) params.key_value = token_tensor(*out_gradient);
  if (args.query_weight) {
    params.query_weight = static_cast<const float*>(args.query_weight->const_data_ptr());
    params.weight_strides = weight_strides(*args.query_weight, false);
  }
  return params;
}

Tensor attention_transposed_cuda(const Tensor& query, const Tensor& key, const Tensor& value_q, const Tensor& lse,
                                 OptionalTensor query_weight, double scale, OptionalTensor head_scale,
                                 OptionalTensor bias, OptionalTensor key_bias, OptionalTensor multiplier,
                                 OptionalTensor head_map, bool is_causal, bool allow_tf32) {
  const Checker checker("attention_transposed");
  const TransposedArguments args(
      checker,
      arguments_on_device(checker, query, key, key, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                          is_causal),
      value_q, lse, query_weight);
  const NeededGradients none{};
  const BackwardLaunches launches(checker, args.attention, none);
  const std::vector<int64_t> sizes = args.out_sizes();
  if (launches.is_empty()) return zeros_as(query, sizes, query.scalar_type());
  Tensor out = empty_as(query, sizes, query.scalar_type());
  launches.sum(params_of(args, allow_tf32, nullptr), Side::kKeys, nullptr, &out);
  return out;
}

// In order, and in float64.
Tensor sum_query_weight(const BackwardLaunches& launches, const Tensor& weight, const Tensor& of_rows) {
  if (weight.numel() == of_rows.numel()) return torch::stable::view(of_rows, sizes_of(weight));
  Tensor grad = launches.gradient_of(weight);
  if (launches.is_empty()) return grad;
  launches.check(launch_sum_rows({.rows = static_cast<const float*>(of_rows.const_data_ptr()),
                                  .batch = of_rows.size(0),
                                  .queries = of_rows.size(1),
                                  .heads = of_rows.size(2),
                                  .weight_strides = {},
                                  .strides = weight_strides(weight, true),
                                  .sums = static_cast<float*>(grad.mutable_data_ptr())},
                                 launches.stream()));
  return grad;
}

Backward attention_transposed_backward_cuda(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                            const Tensor& value_q, const Tensor& lse, OptionalTensor query_weight,
                                            double scale, OptionalTensor head_scale, OptionalTensor bias,
                                            OptionalTensor key_bias, OptionalTensor multiplier, OptionalTensor head_map,
                                            bool is_causal, bool allow_tf32, bool need_query_weight,
                                            bool need_head_scale, bool need_bias, bool need_key_bias,
                                            bool need_multiplier) {
  const Checker checker("attention_transposed_backward");
  const TransposedArguments args(
      checker,
      arguments_on_device(checker, query, key, key, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                          is_causal),
      value_q, lse, query_weight);
  args.check_grad_out(checker, grad_out);
  const Tensor out_gradient = with_unit_last_stride(grad_out);
  const NeededGradients needed{need_head_scale, need_bias, need_key_bias, need_multiplier};
  const BackwardLaunches launches(checker, args.attention, needed);

  const Tensor grad_query = launches.gradient_of(query), grad_key = launches.gradient_of(key);
  const Tensor grad_value = launches.gradient_of(value_q), grad_lse = launches.gradient_of(lse);
  const Tensor grad_row_weight = launches.gradient_of(lse);
  const AttentionBackwardCudaParams params = params_of(args, allow_tf32, &out_gradient);
  launches.sum(params, Side::kKeys, &grad_key, nullptr);
  const TermGradients terms = launches.sum_queries(params, grad_query);
  if (const OptionalTensor dots = launches.sum(params, Side::kQueries, nullptr, &grad_value, true)) {
    launches.check(launch_transposed_rows(params, static_cast<const float*>(dots->const_data_ptr()), dots->size(0),
                                          static_cast<float*>(grad_row_weight.mutable_data_ptr()),
                                          static_cast<float*>(grad_lse.mutable_data_ptr()), launches.stream()));
  }
  const Tensor grad_weight = need_query_weight && args.query_weight
                                 ? sum_query_weight(launches, *args.query_weight, grad_row_weight)
                                 : launches.none();
  return {grad_query,       grad_key,   grad_value,     grad_lse,        grad_weight,
          terms.head_scale, terms.bias, terms.key_bias, terms.multiplier};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("attention_transposed", TORCH_BOX(&vitkernels::attention_transposed_cuda));
  m.impl("attention_transposed_backward", TORCH_BOX(&vitkernels::attention_transposed_backward_cuda));
}
