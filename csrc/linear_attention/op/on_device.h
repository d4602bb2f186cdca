// What the operators of linear attention on a GPU share.
#pragma once

#include "common/check.h"
#include "cuda/device.h"
#include "linear_attention/cuda/launches.h"

namespace vitkernels {

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The kernels count the bytes from a token to the next in 32 bits.
inline Tensor with_near_tokens(const Tensor& t) {
  const int64_t tokens = t.dim() - 3;  // the axis
  const bool is_far = t.size(tokens) > 1 && t.stride(tokens) >= (int64_t(1) << 32) / int64_t(t.element_size());
  return is_far ? as_contiguous(t) : t;
}

// `dtype` is that of the call, `what` the arguments whose head dimensions are limited.
inline void check_on_device(const Checker& checker, DType dtype, const char* what, int64_t largest_dim) {
  checker.check(dtype != DType::kFloat64, "query is float64, takes float32, bfloat16 or float16 on a GPU");
  const bool is_wide = dtype == DType::kBFloat16;
  const int64_t largest = is_wide ? kMaxLinearDim : kMaxLinearDimFloat32;
  checker.check(largest_dim <= largest, what, " has head dimension ", largest_dim, " on CUDA, takes at most ", largest,
                is_wide ? "" : " in float32, which float16 becomes");
}

}  // namespace vitkernels
