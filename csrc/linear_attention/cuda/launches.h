// Launches of the linear attention kernels on a GPU. Plain data, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "linear_attention/linear_attention.h"

namespace vitkernels {

inline constexpr int kMaxLinearDim = 128;        // of heads, in 16 bits
inline constexpr int kMaxLinearDimFloat32 = 64;  // whose state takes twice the shared memory

// How many blocks share the tiles of a (batch, head) pair: by shapes alone, since their partial sums are added in order.
constexpr int64_t linear_blocks_of_pair(int64_t pairs, int64_t tokens) {
  constexpr int64_t kBlocks = 4 * 132;  // enough for a large GPU
  constexpr int64_t kMinTokens = 256;   // fewer would not pay for the state that a block reads or leaves
  return std::clamp<int64_t>(kBlocks / std::max<int64_t>(pairs, 1), 1, std::max<int64_t>(tokens / kMinTokens, 1));
}

// What a block leaves of a state, in floats: [head_dim, pitch] sums of products, whose rows begin with a sector of memory,
// and [head_dim] sums of features.
struct LinearPart {
  int64_t head_dim, value_dim;

  VK_HOST_DEVICE int64_t pitch() const { return (value_dim + 7) / 8 * 8; }
  VK_HOST_DEVICE int64_t size() const { return (head_dim * (pitch() + 1) + 7) / 8 * 8; }
  VK_HOST_DEVICE int64_t features() const { return head_dim * pitch(); }  // where they begin
};

// Params as on the CPU; `splits` is linear_blocks_of_pair(), `parts` are [splits, batch, kv_heads] of LinearPart.
template <DType kDType>
struct LinearLaunches {
  static cudaError_t state(const LinearStateParams& params, bool allow_tf32, cudaStream_t stream);
  static cudaError_t output(const LinearOutputParams& params, bool allow_tf32, cudaStream_t stream);
  static cudaError_t grad_query(const LinearGradQueryParams& params, bool allow_tf32, cudaStream_t stream);
  static cudaError_t grad_key(const LinearGradKeyParams& params, bool allow_tf32, cudaStream_t stream);
};

// state [pairs, head_dim, value_dim + 1] = factor * the sum of the splits' parts, plus another unless that is null.
struct LinearStateSum {
  LinearPart part;
  int64_t pairs = 0, splits = 0;
  const float* parts = nullptr;
  float factor = 1.0f;
  const float* other = nullptr;
  float* state = nullptr;

  VK_HOST_DEVICE int64_t num_elements() const { return pairs * part.head_dim * (part.value_dim + 1); }
};
cudaError_t launch_linear_state_sum(const LinearStateSum& sum, cudaStream_t stream);

}  // namespace vitkernels
