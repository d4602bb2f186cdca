// The operators vitkernels::attention and vitkernels::attention_varlen on a GPU.
#include "attention/op/arguments_cuda.h"
#include "attention/op/offset_launches_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

using Forward = std::tuple<Tensor, Tensor>;

Forward run_forward(const Checker& checker, const AttentionArguments& args, bool allow_tf32) {
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  AttentionCudaParams params;
  fill_on_device(args, out, lse, params);
  params.allow_tf32 = allow_tf32;
  params.splits = attention_key_splits(params);
  OptionalTensor split_out, split_max, split_sum;
  if (params.splits > 1) {
    split_out = empty_as(args.query, {params.splits, out.numel()}, ScalarType::Float);
    split_max = empty_as(args.query, {params.splits, lse.numel()}, ScalarType::Float);
    split_sum = empty_as(args.query, {params.splits, lse.numel()}, ScalarType::Float);
    params.split_out = static_cast<float*>(split_out->mutable_data_ptr());
    params.split_max = static_cast<float*>(split_max->mutable_data_ptr());
    params.split_sum = static_cast<float*>(split_sum->mutable_data_ptr());
  }
  const OnDevice device(args.query);
  const OptionalTensor relative = launch_relative_logits(checker, args, params, device.stream());
  check_cuda(checker, launch_attention(params, device.stream()));
  return {out, lse};
}

Forward attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                       OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                       OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height, OptionalTensor rel_pos_width,
                       int64_t num_prefix_tokens, OptionalTensor head_map, bool is_causal, bool allow_tf32) {
  const Checker checker("attention");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  return run_forward(checker,
                     arguments_on_device(checker, query, key, value,
                                         {scale, head_scale, bias, key_bias, multiplier, on_grid}, head_map, is_causal),
                     allow_tf32);
}

Forward attention_varlen_cuda(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                              OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                              OptionalTensor multiplier, OptionalTensor head_map, bool is_causal, bool allow_tf32) {
  const Checker checker("attention_varlen");
  return run_forward(
      checker,
      arguments_on_device(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                          is_causal, Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}),
      allow_tf32);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("attention", TORCH_BOX(&vitkernels::attention_cuda));
  m.impl("attention_varlen", TORCH_BOX(&vitkernels::attention_varlen_cuda));
}
