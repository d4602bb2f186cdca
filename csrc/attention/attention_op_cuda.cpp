// The operator vitkernels::attention on a GPU.
#include "attention/arguments_cuda.h"
#include "attention/grid_launches_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                                          OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                          OptionalTensor multiplier, OptionalTensor bias_table,
                                          OptionalTensor multiplier_table, OptionalTensor rel_pos_depth,
                                          OptionalTensor rel_pos_height, OptionalTensor rel_pos_width,
                                          int64_t num_prefix_tokens, OptionalTensor head_map, bool is_causal,
                                          bool allow_tf32) {
  const Checker checker("attention");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  const AttentionArguments args = arguments_on_device(
      checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier, on_grid}, head_map, is_causal);
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);
  AttentionCudaParams params;
  fill_on_device(args, out, lse, params);
  params.allow_tf32 = allow_tf32;
  if (lse.numel() > 0) {
    const OnDevice device(query);
    const OptionalTensor relative = launch_relative_logits(checker, args, params, device.stream());
    check_cuda(checker, launch_attention(params, device.stream()));
  }
  return {out, lse};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) { m.impl("attention", TORCH_BOX(&vitkernels::attention_cuda)); }
