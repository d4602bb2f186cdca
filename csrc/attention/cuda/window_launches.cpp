// Not in the header, where each dtype's kernels would be compiled with the others'.
#include "attention/cuda/windows.h"

namespace vitkernels {

cudaError_t launch_window_attention(const WindowCudaParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? WindowLaunches<DType::kBFloat16>::forward(params, stream)
                                          : WindowLaunches<DType::kFloat16>::forward(params, stream);
}

cudaError_t launch_window_attention_backward(const WindowBackwardCudaParams& params, cudaStream_t stream) {
  return params.forward.dtype == DType::kBFloat16 ? WindowLaunches<DType::kBFloat16>::backward(params, stream)
                                                  : WindowLaunches<DType::kFloat16>::backward(params, stream);
}

}  // namespace vitkernels
