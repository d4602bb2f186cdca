# Engine 2, linear attention, under the names of csrc/attention/sources.cmake.
set(engine csrc/linear_attention)

list(APPEND cpu_kernel_sources
  ${engine}/cpu/channel.cpp ${engine}/cpu/channel_grad.cpp ${engine}/cpu/decayed.cpp ${engine}/cpu/grad_key.cpp
  ${engine}/cpu/grad_query.cpp ${engine}/cpu/output.cpp ${engine}/cpu/quadratic.cpp
  ${engine}/cpu/quadratic_grad.cpp ${engine}/cpu/state.cpp)

list(APPEND cpu_op_sources
  ${engine}/op/channel_cpu.cpp ${engine}/op/decayed_cpu.cpp ${engine}/op/linear_attention_cpu.cpp
  ${engine}/op/quadratic_cpu.cpp)

list(APPEND cuda_op_sources ${engine}/op/channel_cuda.cpp ${engine}/op/decayed_cuda.cpp ${engine}/op/linear_attention_cuda.cpp)

list(APPEND cuda_kernel_sources ${engine}/cuda/channel_weights.cu ${engine}/cuda/decayed_prefix.cu ${engine}/cuda/state_sum.cu)

list(APPEND cuda_kernel_sources_of_wide_range
  ${engine}/cuda/channel_grad.cu ${engine}/cuda/channel_sum.cu ${engine}/cuda/decayed.cu ${engine}/cuda/grad_key.cu ${engine}/cuda/grad_query.cu
  ${engine}/cuda/output.cu ${engine}/cuda/state.cu)
