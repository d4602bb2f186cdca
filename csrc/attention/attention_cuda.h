// The attention engine's kernels on a GPU, as host functions that launch them.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.h"

namespace vitkernels {

// Each part costs four pointers of a kernel's arguments, which are limited to 4 KB.
inline constexpr int64_t kMaxMergeParts = 64;

// Values that lie in tensors on the device: read there, and checked there.
struct AttentionCudaParams : AttentionParams {
  const void* head_map = nullptr;  // [heads], or null: equal groups
  bool head_map_is_int64 = false;
  // Rows begin at multiples of 16 bytes and are whole numbers of them.
  bool query_is_aligned = false, key_is_aligned = false, value_is_aligned = false, out_is_aligned = false;

  // The kv head that a query head reads, -1 if the map names none that exists.
  VK_HOST_DEVICE int64_t kv_head(int64_t head) const {
    if (!head_map) return head / (heads / kv_heads);
    const int64_t mapped =
        head_map_is_int64 ? static_cast<const int64_t*>(head_map)[head] : static_cast<const int32_t*>(head_map)[head];
    return mapped >= 0 && mapped < kv_heads ? mapped : -1;
  }
};

inline constexpr int64_t kMaxCudaHeadDim = 256;

cudaError_t launch_attention(const AttentionCudaParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions_backward(const MergeParams& params, cudaStream_t stream);

}  // namespace vitkernels
