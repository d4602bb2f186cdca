// The operators vitkernels::attention_transposed and vitkernels::attention_transposed_backward on the CPU. The
// argument without a name is allow_tf32.
#include "attention/cpu/tile_sizes.h"
#include "attention/op/logit_gradients.h"
#include "attention/op/transposed_arguments.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

using torch::stable::parallel_for;

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void fill(const TransposedArguments& args, AttentionTransposedParams& params) {
  args.attention.fill(params);
  params.value = token_tensor(args.value);
  params.value_dim = args.value.size(3);
  params.lse = const_cast<void*>(args.lse.const_data_ptr());
  if (!args.query_weight) return;
  params.query_weight = args.query_weight->const_data_ptr();
  params.weight_strides = weight_strides(*args.query_weight, false);
}

Tensor attention_transposed_cpu(const Tensor& query, const Tensor& key, const Tensor& value_q, const Tensor& lse,
                                OptionalTensor query_weight, double scale, OptionalTensor head_scale,
                                OptionalTensor bias, OptionalTensor key_bias, OptionalTensor multiplier,
                                OptionalTensor head_map, bool is_causal, bool) {
  const Checker checker("attention_transposed");
  const TransposedArguments args(
      checker, {checker, query, key, key, {scale, head_scale, bias, key_bias, multiplier}, head_map, is_causal},
      value_q, lse, query_weight);
  Tensor out = empty_as(query, args.out_sizes(), query.scalar_type());
  if (out.numel() == 0) return out;
  AttentionTransposedParams params;
  fill(args, params);
  params.out = token_tensor(out);
  const int64_t tasks = params.batch * params.heads * transposed_keys(params).count;
  const int64_t of_kv_head = std::max<int64_t>(params.heads / std::max<int64_t>(params.kv_heads, 1), 1);
  run_kernel(kernel<AttentionTransposedParams>(), params, tasks, of_kv_head, query);
  return out;
}

// d(query_weight) in its own shape from that of each row [B, Nq, heads], in double and in order.
Tensor sum_query_weight(const Tensor& weight, const Tensor& of_rows) {
  Tensor grad = zeros_as(weight, sizes_of(weight), ScalarType::Double);
  if (of_rows.numel() == 0) return torch::stable::to(grad, weight.scalar_type());
  const ScoreStrides strides = weight_strides(weight, true);
  double* sums = static_cast<double*>(grad.mutable_data_ptr());
  const auto sum = [&]<class T>(T) {
    const T* row = static_cast<const T*>(of_rows.const_data_ptr());
    for (int64_t b = 0; b < of_rows.size(0); ++b) {
      for (int64_t query = 0; query < of_rows.size(1); ++query) {
        for (int64_t h = 0; h < of_rows.size(2); ++h) sums[strides.offset(b, h, query, 0)] += *row++;
      }
    }
  };
  if (of_rows.scalar_type() == ScalarType::Double) {
    sum(double{});
  } else {
    sum(float{});
  }
  return torch::stable::to(grad, weight.scalar_type());
}

Backward attention_transposed_backward_cpu(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                           const Tensor& value_q, const Tensor& lse, OptionalTensor query_weight,
                                           double scale, OptionalTensor head_scale, OptionalTensor bias,
                                           OptionalTensor key_bias, OptionalTensor multiplier, OptionalTensor head_map,
                                           bool is_causal, bool, bool need_query_weight, bool need_head_scale,
                                           bool need_bias, bool need_key_bias, bool need_multiplier) {
  const Checker checker("attention_transposed_backward");
  const TransposedArguments args(
      checker, {checker, query, key, key, {scale, head_scale, bias, key_bias, multiplier}, head_map, is_causal},
      value_q, lse, query_weight);
  args.check_grad_out(checker, grad_out);
  const Tensor out_gradient = with_unit_last_stride(grad_out);

  const Tensor grad_value = empty_as(value_q, sizes_of(value_q), value_q.scalar_type());
  const Tensor grad_lse = empty_as(lse, sizes_of(lse), lse.scalar_type());
  const Tensor grad_row_weight = empty_as(lse, sizes_of(lse), lse.scalar_type());
  AttentionTransposedBackwardParams params;
  fill(args, params);
  params.grad_out = token_tensor(out_gradient);
  params.grad_value = token_tensor(grad_value);
  params.grad_row_lse = grad_lse.mutable_data_ptr();
  params.grad_row_weight = grad_row_weight.mutable_data_ptr();
  LogitGradients grads(args.attention, {need_head_scale, need_bias, need_key_bias, need_multiplier}, params);
  const Kernel<AttentionTransposedBackwardParams>& kernel = vitkernels::kernel<AttentionTransposedBackwardParams>();
  const int64_t part_elements = kernel.parts(params) / int64_t(lse.element_size());
  const Tensor value_parts = zeros_as(lse, {part_elements}, lse.scalar_type());
  params.grad_value_parts = value_parts.mutable_data_ptr();

  // An empty tensor may claim any batch size.
  const bool is_empty = query.numel() == 0 && key.numel() == 0;
  if (params.num_tasks() > 0 && !is_empty) run_kernel(kernel, params, params.num_tasks(), 1, query);
  if (query.numel() > 0) {
    parallel_for(0, params.batch * params.heads, 1,
                 [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
  }
  grads.finish(args.attention, params);
  const Tensor grad_weight = need_query_weight && args.query_weight
                                 ? sum_query_weight(*args.query_weight, grad_row_weight)
                                 : none_as(lse, lse.scalar_type());
  return {grads.query,      grads.key,  grad_value,     grad_lse,        grad_weight,
          grads.head_scale, grads.bias, grads.key_bias, grads.multiplier};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention_transposed", TORCH_BOX(&vitkernels::attention_transposed_cpu));
  m.impl("attention_transposed_backward", TORCH_BOX(&vitkernels::attention_transposed_backward_cpu));
}
