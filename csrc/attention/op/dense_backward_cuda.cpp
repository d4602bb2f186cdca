// The operators vitkernels::attention_backward and vitkernels::attention_varlen_backward on a GPU.
#include "attention/op/offset_launches_cuda.h"

namespace vitkernels {
namespace {

Backward run_backward(const Checker& checker, const AttentionArguments& args, const BackwardArguments& from,
                      bool allow_tf32) {
  from.check(checker, args);
  const BackwardLaunches launches(checker, args, from.needed);
  const Tensor grad_out = with_unit_last_stride(from.grad_out), out = with_unit_last_stride(from.out);
  const Tensor lse = torch::stable::contiguous(from.lse);
  OptionalTensor grad_lse;
  if (from.grad_lse) grad_lse = torch::stable::contiguous(*from.grad_lse);
  const Tensor delta = launches.gradient_of(lse);
  const Tensor query = launches.gradient_of(args.query), key = launches.gradient_of(args.key);
  const Tensor value = launches.gradient_of(args.value);

  AttentionBackwardCudaParams params;
  fill_on_device(args, out, lse, params);
  params.allow_tf32 = allow_tf32;
  params.query_value = token_tensor(grad_out);
  params.key_value = params.value;
  params.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  OptionalTensor relative_logits;
  if (!launches.is_empty()) {
    relative_logits = launch_relative_logits(checker, args, params, launches.stream());
    launches.check(launch_attention_backward_delta(params, launches.stream()));
  }
  const GridGradientsOnDevice on_grid(launches, args, from.needed.on_grid, params);
  launches.sum(params, Side::kKeys, &key, &value);
  const TermGradients terms = launches.sum_queries(params, query);
  const auto [bias_table, multiplier_table, depth, height, width] = on_grid.compute(params);
  return {query,
          key,
          value,
          terms.head_scale,
          terms.bias,
          terms.key_bias,
          terms.multiplier,
          bias_table,
          multiplier_table,
          depth,
          height,
          width};
}

Backward attention_backward_cuda(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query,
                                 const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                 double scale, OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                 OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                                 OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height,
                                 OptionalTensor rel_pos_width, int64_t num_prefix_tokens, OptionalTensor head_map,
                                 bool is_causal, bool allow_tf32, bool need_head_scale, bool need_bias,
                                 bool need_key_bias, bool need_multiplier, bool need_bias_table,
                                 bool need_multiplier_table, bool need_rel_pos_depth, bool need_rel_pos_height,
                                 bool need_rel_pos_width) {
  const Checker checker("attention_backward");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  const AttentionArguments args = arguments_on_device(
      checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier, on_grid}, head_map, is_causal);
  const WantedOnGrid needed{need_bias_table, need_multiplier_table, need_rel_pos_depth, need_rel_pos_height,
                            need_rel_pos_width};
  return run_backward(
      checker, args,
      {grad_out, grad_lse, out, lse, {need_head_scale, need_bias, need_key_bias, need_multiplier, needed}}, allow_tf32);
}

VarlenBackward attention_varlen_backward_cuda(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query,
                                              const Tensor& key, const Tensor& value, const Tensor& out,
                                              const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                              int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                              OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                              OptionalTensor multiplier, OptionalTensor head_map, bool is_causal,
                                              bool allow_tf32, bool need_head_scale, bool need_bias, bool need_key_bias,
                                              bool need_multiplier) {
  const Checker checker("attention_varlen_backward");
  const AttentionArguments args =
      arguments_on_device(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                          is_causal, Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k});
  return without_grid(run_backward(
      checker, args, {grad_out, grad_lse, out, lse, {need_head_scale, need_bias, need_key_bias, need_multiplier}},
      allow_tf32));
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("attention_backward", TORCH_BOX(&vitkernels::attention_backward_cuda));
  m.impl("attention_varlen_backward", TORCH_BOX(&vitkernels::attention_varlen_backward_cuda));
}
