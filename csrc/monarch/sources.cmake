# Engine 3, Monarch matrices, under the names of csrc/attention/sources.cmake.
set(engine csrc/monarch)

list(APPEND cpu_kernel_sources
  ${engine}/cpu/grad_epilogue.cpp ${engine}/cpu/grad_input.cpp ${engine}/cpu/grad_weight.cpp ${engine}/cpu/long_conv.cpp
  ${engine}/cpu/long_conv_grad.cpp ${engine}/cpu/multiply.cpp ${engine}/cpu/pack.cpp
  ${engine}/cpu/spectral_gating.cpp ${engine}/cpu/spectral_gating_grad.cpp)

list(APPEND cpu_op_sources
  ${engine}/op/long_conv_cpu.cpp ${engine}/op/monarch_cpu.cpp ${engine}/op/spectral_gating_cpu.cpp)

list(APPEND cuda_op_sources
  ${engine}/op/long_conv_cuda.cpp ${engine}/op/monarch_cuda.cpp ${engine}/op/spectral_gating_cuda.cpp)

list(APPEND cuda_kernel_sources_by_dtype
  ${engine}/cuda/grad_weight.cu ${engine}/cuda/long_conv.cu ${engine}/cuda/long_conv_grad.cu
  ${engine}/cuda/long_conv_outer.cu ${engine}/cuda/multiply.cu ${engine}/cuda/spectral_gating.cu
  ${engine}/cuda/sums.cu)
