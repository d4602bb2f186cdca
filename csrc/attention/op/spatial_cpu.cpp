// The operators vitkernels::spatial_attention and vitkernels::spatial_attention_backward on the CPU.
#include "attention/cpu/tile_sizes.h"
#include "attention/op/spatial_gradients.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

using Forward = std::tuple<Tensor, Tensor>;
// Of query, key, value, their fills and the score terms, in the order of the arguments.
using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward spatial_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, std::vector<int64_t> axes,
                              double radius, bool has_outside, bool is_shared_query, OptionalTensor key_fill,
                              OptionalTensor value_fill, double scale, OptionalTensor head_scale,
                              OptionalTensor key_bias, OptionalTensor bias_table, OptionalTensor multiplier_table,
                              OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height, OptionalTensor rel_pos_width,
                              OptionalTensor head_map, bool) {
  const GridArguments on_grid{bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}};
  const SpatialArguments args(Checker("spatial_attention"), {query,
                                                             key,
                                                             value,
                                                             axes,
                                                             radius,
                                                             has_outside,
                                                             is_shared_query,
                                                             key_fill,
                                                             value_fill,
                                                             {scale, head_scale, {}, key_bias, {}, on_grid},
                                                             head_map});
  Tensor out = empty_as(query, args.out_sizes(), query.scalar_type());
  Tensor lse = empty_as(query, args.lse_sizes(), statistics_type(args.dtype));
  if (args.is_empty()) return {out, lse};
  SpatialParams params;
  args.fill(params);
  params.out = map_tensor(out, args.axes);
  params.lse = lse.mutable_data_ptr();
  const int64_t of_head = params.batch * params.num_tiles() * spatial_row_blocks(params);
  run_kernel(kernel<SpatialParams>(), params, params.heads * of_head, of_head, query);
  return {out, lse};
}

void check_gradients(const Checker& checker, const SpatialArguments& args, const Tensor& grad_out,
                     const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse) {
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    checker.strided_like(name, *t, args.query);
    checker.dtype(name, *t, args.query.scalar_type());
    checker.shape(name, *t, args.out_sizes());
  }
  for (const auto& [name, t] : {std::pair{"lse", &lse}, {"grad_lse", grad_lse ? &*grad_lse : nullptr}}) {
    if (!t) continue;
    checker.strided_like(name, *t, args.query);
    checker.dtype(name, *t, statistics_type(args.dtype));
    checker.shape(name, *t, args.lse_sizes());
  }
}

Backward spatial_attention_backward_cpu(
    const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, std::vector<int64_t> axes, double radius, bool has_outside,
    bool is_shared_query, OptionalTensor key_fill, OptionalTensor value_fill, double scale, OptionalTensor head_scale,
    OptionalTensor key_bias, OptionalTensor bias_table, OptionalTensor multiplier_table, OptionalTensor rel_pos_depth,
    OptionalTensor rel_pos_height, OptionalTensor rel_pos_width, OptionalTensor head_map, bool, bool need_key_fill,
    bool need_value_fill, bool need_head_scale, bool need_key_bias, bool need_bias_table, bool need_multiplier_table,
    bool need_rel_pos_depth, bool need_rel_pos_height, bool need_rel_pos_width) {
  const Checker checker("spatial_attention_backward");
  const GridArguments on_grid{bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}};
  const SpatialArguments args(checker, {query,
                                        key,
                                        value,
                                        axes,
                                        radius,
                                        has_outside,
                                        is_shared_query,
                                        key_fill,
                                        value_fill,
                                        {scale, head_scale, {}, key_bias, {}, on_grid},
                                        head_map});
  check_gradients(checker, args, grad_out, grad_lse, out, lse);
  const Tensor out_gradient = with_unit_last_stride(grad_out), out_rows = with_unit_last_stride(out);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  OptionalTensor lse_gradient;
  if (grad_lse) lse_gradient = torch::stable::contiguous(*grad_lse);

  SpatialBackwardParams params;
  args.fill(params);
  params.out = map_tensor(out_rows, args.axes);
  params.grad_out = map_tensor(out_gradient, args.axes);
  params.lse = const_cast<void*>(lse_rows.const_data_ptr());
  params.grad_lse = lse_gradient ? lse_gradient->const_data_ptr() : nullptr;
  SpatialGradients grads(
      args,
      {need_key_fill,
       need_value_fill,
       need_head_scale,
       need_key_bias,
       {need_bias_table, need_multiplier_table, need_rel_pos_depth, need_rel_pos_height, need_rel_pos_width}},
      params);
  if (!args.is_empty()) run_kernel(kernel<SpatialBackwardParams>(), params, params.num_tasks(), 1, query);
  grads.finish(args, params);
  return {grads.query,    grads.key,        grads.value,      grads.key_fill,   grads.value_fill, grads.head_scale,
          grads.key_bias, grads.on_grid[0], grads.on_grid[1], grads.on_grid[2], grads.on_grid[3], grads.on_grid[4]};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("spatial_attention_backward", TORCH_BOX(&vitkernels::spatial_attention_backward_cpu));
  m.impl("spatial_attention", TORCH_BOX(&vitkernels::spatial_attention_cpu));
}
