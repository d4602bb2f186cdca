# Engine 1, softmax attention. Every engine lists its sources under these names.
set(engine csrc/attention)

# Compiled once per instruction set.
list(APPEND cpu_kernel_sources
  ${engine}/cpu/backward.cpp ${engine}/cpu/forward.cpp ${engine}/cpu/listed_backward.cpp
  ${engine}/cpu/listed_forward.cpp ${engine}/cpu/lone_query_backward.cpp ${engine}/cpu/lone_query_forward.cpp
  ${engine}/cpu/merge_attentions.cpp ${engine}/cpu/region_means.cpp ${engine}/cpu/route.cpp
  ${engine}/cpu/spatial_backward.cpp ${engine}/cpu/spatial_forward.cpp ${engine}/cpu/transposed.cpp
  ${engine}/cpu/transposed_backward.cpp ${engine}/cpu/unit_rows.cpp)

# Of both libraries: argument checks.
list(APPEND op_sources
  ${engine}/op/arguments.cpp ${engine}/op/calls.cpp ${engine}/op/listed_arguments.cpp
  ${engine}/op/offset_arguments.cpp
  ${engine}/op/spatial_arguments.cpp ${engine}/spatial_tiles.cpp)

list(APPEND cpu_op_sources
  ${engine}/op/dense_cpu.cpp ${engine}/op/listed_cpu.cpp ${engine}/op/logit_gradients.cpp ${engine}/op/merge_attentions_cpu.cpp
  ${engine}/op/route_cpu.cpp ${engine}/op/spatial_cpu.cpp ${engine}/op/spatial_gradients.cpp ${engine}/op/spatial_sums.cpp
  ${engine}/op/transposed_cpu.cpp)

list(APPEND cuda_op_sources
  ${engine}/op/arguments_cuda.cpp ${engine}/op/backward_launches_cuda.cpp
  ${engine}/op/dense_cuda.cpp ${engine}/op/dense_launches_cuda.cpp ${engine}/op/merge_attentions_cuda.cpp
  ${engine}/op/offset_launches_cuda.cpp ${engine}/op/spatial_backward_cuda.cpp
  ${engine}/op/spatial_cuda.cpp ${engine}/op/spatial_params_cuda.cpp
  ${engine}/op/transposed_cuda.cpp ${engine}/cuda/spatial_launches.cpp ${engine}/cuda/window_launches.cpp)

list(APPEND cuda_kernel_sources
  ${engine}/cuda/axes_sum.cu ${engine}/cuda/backward_delta.cu ${engine}/cuda/backward_rows.cu
  ${engine}/cuda/backward_tables.cu ${engine}/cuda/backward_terms.cu ${engine}/cuda/expand_bias.cu ${engine}/cuda/merge_attentions.cu
  ${engine}/cuda/rel_pos.cu ${engine}/cuda/spatial_rel_pos.cu ${engine}/cuda/sum_parts.cu
  ${engine}/cuda/unit_rows.cu)

# Compiled once per dtype: four head dimensions of one are as much as the compiler should have at a time.
list(APPEND cuda_kernel_sources_by_dtype
  ${engine}/cuda/backward.cu ${engine}/cuda/forward.cu ${engine}/cuda/spatial_backward.cu
  ${engine}/cuda/spatial_forward.cu)
list(APPEND cuda_kernel_sources_16_bit
  ${engine}/cuda/backward_plain_keys.cu ${engine}/cuda/backward_plain_queries.cu ${engine}/cuda/forward_plain.cu
  ${engine}/cuda/forward_resident.cu ${engine}/cuda/spatial_forward_plain.cu ${engine}/cuda/window_backward.cu
  ${engine}/cuda/window_forward.cu)
