// The operators vitkernels::spatial_attention and vitkernels::spatial_attention_backward on the CPU.
#include "attention/spatial_arguments.h"
#include "attention/tiles_cpu.h"
#include "cpu/isa.h"

namespace vitkernels {
namespace {

using torch::stable::parallel_for;

using Forward = std::tuple<Tensor, Tensor>;

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
  const Kernels& kernels = vitkernels::kernels();
  const int64_t tasks = params.heads * params.batch * params.num_tiles() * spatial_row_blocks(params);
  const ThreadScratch scratch(query, kernels.spatial_attention_scratch(params), tasks);
  parallel_for(0, tasks, 1,
               [&](int64_t begin, int64_t end) { kernels.spatial_attention(params, begin, end, scratch.mine()); });
  return {out, lse};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("spatial_attention", TORCH_BOX(&vitkernels::spatial_attention_cpu));
}
