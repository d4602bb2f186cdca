// A tensor of tokens as kernels read it. Plain data, no torch.
#pragma once

#include <cstdint>

#include "common/range.h"

namespace vitkernels {

// A tensor [batch, tokens, heads, dim] with a unit last stride. Strides are in elements.
struct TokenTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
  bool is_aligned = false;  // addresses and lengths of rows are multiples of 16 bytes

  VK_HOST_DEVICE int64_t offset(int64_t batch, int64_t token, int64_t head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
  template <class S>
  VK_HOST_DEVICE S* at(int64_t batch, int64_t token, int64_t head) const {
    return static_cast<S*>(data) + offset(batch, token, head);
  }
};

}  // namespace vitkernels
