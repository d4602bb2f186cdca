// From a tensor argument (B, N, heads, dim), or (tokens, heads, dim) without a batch, to what kernels read.
#pragma once

#include "common/stable.h"
#include "common/token_tensor.h"

namespace vitkernels {

inline TokenTensor token_tensor(const Tensor& t) {
  constexpr int64_t kAlignment = 16;
  // In elements: a stride of an axis of size 1 or 0 may be too large to be counted in bytes.
  const int64_t tokens = t.dim() - 3, elements = kAlignment / t.element_size();
  bool is_aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0;
  for (int64_t i = 0; i < t.dim() - 1; ++i) is_aligned = is_aligned && (t.size(i) <= 1 || t.stride(i) % elements == 0);
  return {.data = const_cast<void*>(t.const_data_ptr()),
          .batch_stride = tokens ? t.stride(0) : 0,
          .token_stride = t.size(tokens) > 1 ? t.stride(tokens) : 0,  // that of an only token may be anything
          .head_stride = t.stride(tokens + 1),
          .is_aligned = is_aligned && t.size(t.dim() - 1) % elements == 0};
}

}  // namespace vitkernels
