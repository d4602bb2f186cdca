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

struct AttentionBackwardCudaParams : AttentionCudaParams {
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse = nullptr;  // as lse, or null
  float* delta = nullptr;           // [rows, heads]: dO.O - dlse, so that dS = P * (dP - delta)
  bool grad_out_is_aligned = false, grad_query_is_aligned = false, grad_key_is_aligned = false,
       grad_value_is_aligned = false;
};

// What the gradient of a score term sums: that of the logits (biases), times the scaled product (multiplier), times the
// product and everything else on it (scale of a head).
enum class TermFactor { kOne, kScaledProduct, kProduct };

struct TermGradient {
  TermFactor factor = TermFactor::kOne;
  ScoreStrides strides;
  float* data = nullptr;
};

inline constexpr int64_t kMaxCudaHeadDim = 256;

cudaError_t launch_attention(const AttentionCudaParams& params, cudaStream_t stream);
// Writes delta, which the others read.
cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_keys(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_queries(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_term(const AttentionBackwardCudaParams& params, const TermGradient& term,
                                           cudaStream_t stream);
cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions_backward(const MergeParams& params, cudaStream_t stream);

}  // namespace vitkernels
