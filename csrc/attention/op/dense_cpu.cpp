// The operators vitkernels::attention and vitkernels::attention_varlen on the CPU, and their backward operators. The
// argument without a name is allow_tf32.
#include "attention/op/backward_arguments.h"
#include "attention/op/logit_gradients.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

using Forward = std::tuple<Tensor, Tensor>;

Forward run_forward(const AttentionArguments& args) {
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), statistics_type(args.dtype));
  AttentionParams params;
  args.fill(params);
  params.out = token_tensor(out);
  params.lse = lse.mutable_data_ptr();

  if (args.num_tasks > 0) {
    const int64_t of_head = params.first_task ? 1 : args.num_tasks / (params.batch * params.heads);
    run_kernel(kernel<AttentionParams>(), params, args.num_tasks, of_head, args.query);
  }
  return {out, lse};
}

Backward run_backward(const AttentionArguments& args, const BackwardArguments& from) {
  const Tensor grad_out = with_unit_last_stride(from.grad_out), out = with_unit_last_stride(from.out);
  const Tensor lse = torch::stable::contiguous(from.lse);
  OptionalTensor grad_lse;
  if (from.grad_lse) grad_lse = torch::stable::contiguous(*from.grad_lse);
  Tensor grad_value = empty_as(args.value, sizes_of(args.value), args.value.scalar_type());

  AttentionBackwardParams params;
  args.fill(params);
  params.out = token_tensor(out);
  params.grad_out = token_tensor(grad_out);
  params.lse = const_cast<void*>(lse.const_data_ptr());
  params.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  params.grad_value = token_tensor(grad_value);
  LogitGradients grads(args, from.needed, params);

  // An empty tensor may claim any batch size.
  const bool is_empty = args.query.numel() == 0 && args.key.numel() == 0;
  if (params.num_tasks() > 0 && !is_empty) {
    run_kernel(kernel<AttentionBackwardParams>(), params, params.num_tasks(), 1, args.query);
  }
  grads.finish(args, params);
  return {grads.query,      grads.key,        grad_value,       grads.head_scale, grads.bias,       grads.key_bias,
          grads.multiplier, grads.on_grid[0], grads.on_grid[1], grads.on_grid[2], grads.on_grid[3], grads.on_grid[4]};
}

Forward attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                      OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                      OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                      OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height, OptionalTensor rel_pos_width,
                      int64_t num_prefix_tokens, OptionalTensor head_map, bool is_causal, bool) {
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  return run_forward({Checker("attention"),
                      query,
                      key,
                      value,
                      {scale, head_scale, bias, key_bias, multiplier, on_grid},
                      head_map,
                      is_causal});
}

Backward attention_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query, const Tensor& key,
                                const Tensor& value, const Tensor& out, const Tensor& lse, double scale,
                                OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                                OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height,
                                OptionalTensor rel_pos_width, int64_t num_prefix_tokens, OptionalTensor head_map,
                                bool is_causal, bool, bool need_head_scale, bool need_bias, bool need_key_bias,
                                bool need_multiplier, bool need_bias_table, bool need_multiplier_table,
                                bool need_rel_pos_depth, bool need_rel_pos_height, bool need_rel_pos_width) {
  const Checker checker("attention_backward");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  const AttentionArguments args(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier, on_grid},
                                head_map, is_causal);
  const WantedOnGrid need_on_grid{need_bias_table, need_multiplier_table, need_rel_pos_depth, need_rel_pos_height,
                                  need_rel_pos_width};
  const BackwardArguments from{
      grad_out, grad_lse, out, lse, {need_head_scale, need_bias, need_key_bias, need_multiplier, need_on_grid}};
  from.check(checker, args);
  return run_backward(args, from);
}

Forward attention_varlen_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                             OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                             OptionalTensor multiplier, OptionalTensor head_map, bool is_causal, bool) {
  return run_forward({Checker("attention_varlen"),
                      query,
                      key,
                      value,
                      {scale, head_scale, bias, key_bias, multiplier},
                      head_map,
                      is_causal,
                      Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}});
}

VarlenBackward attention_varlen_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query,
                                             const Tensor& key, const Tensor& value, const Tensor& out,
                                             const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                             OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                             OptionalTensor multiplier, OptionalTensor head_map, bool is_causal, bool,
                                             bool need_head_scale, bool need_bias, bool need_key_bias,
                                             bool need_multiplier) {
  const Checker checker("attention_varlen_backward");
  const AttentionArguments args(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                                is_causal, Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k});
  const BackwardArguments from{
      grad_out, grad_lse, out, lse, {need_head_scale, need_bias, need_key_bias, need_multiplier}};
  from.check(checker, args);
  return without_grid(run_backward(args, from));
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&vitkernels::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vitkernels::attention_backward_cpu));
  m.impl("attention_varlen", TORCH_BOX(&vitkernels::attention_varlen_cpu));
  m.impl("attention_varlen_backward", TORCH_BOX(&vitkernels::attention_varlen_backward_cpu));
}
