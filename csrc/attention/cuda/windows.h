// Params of the kernels of attention in windows, and their launches. Plain data, no torch.
#pragma once

#include "attention/cuda/launches.h"
#include "attention/cuda/tile_sizes.h"

namespace vitkernels {

// At most this many tokens have the kernels here.
inline constexpr int kMaxWindowTokens = 64;
// From a token to the next, in elements: distances in bytes have 32 bits.
inline constexpr int64_t kMaxWindowStride = int64_t(1) << 30;
// Bias tables are divided by the scale.
inline constexpr float kMinWindowScale = 1e-30f, kMaxWindowScale = 1e30f;

// One axis of a map that windows divide. With a step s, the tokens r, r + s, r + 2 s, ... are neighbours in class r.
// With a shift, the last window of a class ends with the tokens before the first one, and these do not see the others.
struct WindowAxis {
  int tokens = 1, size = 1, shift = 0, step = 1;  // size and shift count tokens of a class

  VK_HOST_DEVICE int num_windows() const { return tokens / size; }
  VK_HOST_DEVICE int num_of_class() const { return tokens / step / size; }
};

struct WindowCudaParams {
  DType dtype = DType::kBFloat16;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  WindowAxis axis[kMaxAxes];
  TokenTensor query, key, value, out;  // tokens of the map, row by row
  float* lse = nullptr;                // [batch, tokens, heads]; the backward reads it
  float scale = 1.0f;
  const float* head_scale = nullptr;  // [heads], multiplied with the scale, or null
  bool qk_norm = false;               // queries and keys become unit vectors
  const float* table = nullptr;       // [heads or 1, offsets], or null
  int64_t table_head_stride = 0;
  DeviceOffsetGrid grid;  // of the table

  VK_HOST_DEVICE int num_tokens() const { return axis[0].tokens * axis[1].tokens * axis[2].tokens; }
  VK_HOST_DEVICE int num_slots() const { return axis[0].size * axis[1].size * axis[2].size; }
  int64_t num_windows() const { return int64_t(num_tokens() / num_slots()) * batch; }
  VK_HOST_DEVICE bool changes_rows() const { return qk_norm || head_scale != nullptr; }
};

struct WindowBackwardCudaParams {
  WindowCudaParams forward;
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse = nullptr;  // as lse, or null
  // A part for each block of a head, or null.
  PartialSums table;       // [heads, offsets], zero at first
  PartialSums head_scale;  // [heads]
};

template <DType kDType>
struct WindowLaunches {
  static cudaError_t forward(const WindowCudaParams& params, cudaStream_t stream);
  static cudaError_t backward(const WindowBackwardCudaParams& params, cudaStream_t stream);
};

// A block takes so many windows of a head that what it needs once is cheap, if a large GPU still has several blocks for
// each multiprocessor.
inline constexpr int kMaxWindowsOfBlock = 16;
inline int64_t windows_of_block(const WindowCudaParams& p) {
  return std::clamp<int64_t>(p.num_windows() * p.heads / (4 * kBlocksOfLargeGpu), 1, kMaxWindowsOfBlock);
}
// The blocks of a head: parts of what the backward sums.
inline int64_t window_parts(const WindowCudaParams& p) {
  return (p.num_windows() + windows_of_block(p) - 1) / windows_of_block(p);
}

cudaError_t launch_window_attention(const WindowCudaParams& params, cudaStream_t stream);
cudaError_t launch_window_attention_backward(const WindowBackwardCudaParams& params, cudaStream_t stream);

}  // namespace vitkernels
