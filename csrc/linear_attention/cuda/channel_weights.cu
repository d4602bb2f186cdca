// The weights of channel attention on a GPU, from sums over the tokens, and the gradient of these: small matrices in
// float. A warp has a row of channels, which are those of query; a lane has some of key's.

#include <limits>

#include "cuda/launch.h"
#include "linear_attention/cuda/channel_launches.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kRows = 32;  // in shared memory, since other matrices are transposed
constexpr int kOfLane = kMaxLinearDim / kWarpSize, kPitch = kMaxLinearDim + 1;
constexpr float kNormEpsilon = 1e-12f;  // torch.nn.functional.normalize's

// Zeros have norm 1: the gradient of a channel of zeros would be divided by the epsilon.
__device__ float norm_of(float squares) {
  const float norm = sqrtf(squares);
  return norm == 0.0f ? 1.0f : norm < kNormEpsilon ? kNormEpsilon : norm;
}

__device__ float scale_of(const ChannelProblem& p, int64_t pair) {
  const float scale = float(p.scale);
  return p.head_scale ? scale * static_cast<const float*>(p.head_scale)[pair % p.heads] : scale;
}

// Calls f(i, column) for the columns of this lane.
template <class Function>
__device__ __forceinline__ void for_each_column(int columns, Function&& f) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int column = lane_index() + i * kWarpSize;
    if (column < columns) f(i, column);
  }
}

// Products become weights.
__device__ void softmax(float (&row)[kOfLane], int columns, float scale) {
  float max = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for_each_column(columns, [&](int i, int) { max = fmaxf(max, row[i] *= scale); });
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, distance));
  }
  for_each_column(columns, [&](int i, int) { sum += row[i] = expf(row[i] - max); });
  const float factor = 1.0f / warp_sum(sum);
  for_each_column(columns, [&](int i, int) { row[i] *= factor; });
}

// A block has some rows of a pair.
__global__ void __launch_bounds__(kThreads) channel_weights(const __grid_constant__ ChannelWeightsParams params) {
  __shared__ float shared[kRows][kPitch];
  const ChannelProblem& p = params.problem;
  const int rows = int(p.head_dim), columns = int(p.value_dim), pitch = columns + 1;
  const int blocks = ceil_div(rows, kRows), pair = int(blockIdx.x) / blocks;
  const int first = (int(blockIdx.x) - pair * blocks) * kRows, end = min(first + kRows, rows);
  const float scale = scale_of(p, pair);
  const float* const sums = params.sums + pair * p.state_size();
  float* const state = params.state ? params.state + pair * p.state_size() : nullptr;
  float key_norms[kOfLane] = {};
  for_each_column(columns, [&](int i, int c) { key_norms[i] = p.normalizes ? norm_of(sums[rows * pitch + c]) : 1.0f; });
  for (int d = first + int(threadIdx.x) / kWarpSize; d < end; d += kWarps) {
    float row[kOfLane];
    for_each_column(columns, [&](int i, int c) { row[i] = sums[d * pitch + c]; });
    if (state) {
      const float norm = p.normalizes ? norm_of(sums[d * pitch + columns]) : 1.0f;
      for_each_column(columns, [&](int i, int c) {
        if (p.normalizes) row[i] = row[i] / key_norms[i] / norm;
        state[d * pitch + c] = row[i];
      });
      if (lane_index() == 0) state[d * pitch + columns] = norm;
    }
    softmax(row, columns, scale);
    for_each_column(columns, [&](int i, int c) { shared[d - first][c] = row[i]; });
  }
  if (state && first == 0 && threadIdx.x < kWarpSize) {
    for_each_column(columns, [&](int i, int c) { state[rows * pitch + c] = key_norms[i]; });
    if (threadIdx.x == 0) state[rows * pitch + columns] = 0.0f;
  }
  __syncthreads();
  float* const weights = params.weights + int64_t(pair) * columns * (rows + 1);
  for (int i = threadIdx.x; i < columns * kRows; i += kThreads) {
    const int c = i / kRows, d = first + i % kRows;
    if (d < end) weights[c * (rows + 1) + d] = shared[d - first][c];
    if (d == rows - 1) weights[c * (rows + 1) + rows] = 0.0f;
  }
}

// How much of a channel itself its gradient loses, from the sum of its products' and the gradient of its norm. A norm
// that was raised to the epsilon has no gradient; that of zeros, 1, is multiplied with zeros.
__device__ float lost(const ChannelProblem& p, float sum, float norm, float grad_norm) {
  return !p.normalizes || norm <= kNormEpsilon ? 0.0f : (sum / norm - grad_norm) / norm;
}

// A block has a pair.
__global__ void __launch_bounds__(kThreads)
    channel_weights_grad(const __grid_constant__ ChannelWeightsGradParams params) {
  __shared__ float shared[kRows][kPitch];
  const ChannelProblem& p = params.problem;
  const int rows = int(p.head_dim), columns = int(p.value_dim), pitch = columns + 1;
  const int pair = int(blockIdx.x), warp = int(threadIdx.x) / kWarpSize;
  const float scale = scale_of(p, pair);
  const float* const state = params.state + pair * p.state_size();
  const float* const given = params.grad_state ? params.grad_state + pair * p.state_size() : nullptr;
  const float* const grad_weights = params.grad_weights + int64_t(pair) * columns * (rows + 1);
  float* const grads = params.grads + pair * p.state_size();
  const auto given_at = [&](int i) { return given ? given[i] : 0.0f; };
  float key_norms[kOfLane] = {}, of_keys[kOfLane] = {}, of_scale = 0.0f;
  for_each_column(columns, [&](int i, int c) { key_norms[i] = state[rows * pitch + c]; });
  for (int first = 0; first < rows; first += kRows) {
    const int end = min(first + kRows, rows);
    __syncthreads();  // all reads of the rows before are done
    for (int i = threadIdx.x; i < columns * kRows; i += kThreads) {
      const int c = i / kRows, d = first + i % kRows;
      if (d < end) shared[d - first][c] = grad_weights[c * (rows + 1) + d];
    }
    __syncthreads();
    for (int d = first + warp; d < end; d += kWarps) {
      float product[kOfLane], weight[kOfLane], dot = 0.0f, of_query = 0.0f;
      for_each_column(columns, [&](int i, int c) { weight[i] = product[i] = state[d * pitch + c]; });
      const float norm = state[d * pitch + columns];
      softmax(weight, columns, scale);
      for_each_column(columns, [&](int i, int c) { dot = fmaf(weight[i], shared[d - first][c], dot); });
      dot = warp_sum(dot);
      for_each_column(columns, [&](int i, int c) {
        const float of_logit = weight[i] * (shared[d - first][c] - dot);
        const float of_product = fmaf(of_logit, scale, given_at(d * pitch + c));
        of_scale = fmaf(of_logit, product[i], of_scale);
        of_query = fmaf(of_product, product[i], of_query);
        of_keys[i] = fmaf(of_product, product[i], of_keys[i]);
        grads[d * pitch + c] = of_product / key_norms[i] / norm;
      });
      of_query = warp_sum(of_query);
      if (lane_index() == 0) {
        grads[d * pitch + columns] = lost(p, of_query, norm, given_at(d * pitch + columns));
      }
    }
  }
  of_scale = warp_sum(of_scale);
  __syncthreads();
  for_each_column(columns, [&](int i, int c) { shared[warp][c] = of_keys[i]; });
  if (lane_index() == 0) shared[kWarps][warp] = of_scale;
  __syncthreads();
  if (warp > 0) return;
  for_each_column(columns, [&](int i, int c) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][c];
    grads[rows * pitch + c] = lost(p, sum, key_norms[i], given_at(rows * pitch + c));
  });
  if (threadIdx.x > 0) return;
  grads[rows * pitch + columns] = 0.0f;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += shared[kWarps][w];
  if (params.grad_scale) params.grad_scale[pair] = sum;
}

__global__ void __launch_bounds__(kThreads)
    channel_scale_sum(int64_t batch, int64_t heads, float scale, const float* of_pairs, float* grad_head_scale) {
  const int64_t head = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (head >= heads) return;
  double sum = 0.0;
  for (int64_t b = 0; b < batch; ++b) sum += double(of_pairs[b * heads + head]);
  grad_head_scale[head] = float(sum) * scale;
}

}  // namespace

cudaError_t launch_channel_weights(const ChannelWeightsParams& params, cudaStream_t stream) {
  const int64_t blocks = params.problem.num_pairs() * ceil_div<int64_t>(params.problem.head_dim, kRows);
  return launch_tasks(channel_weights, blocks, kThreads, 0, stream, params);
}

cudaError_t launch_channel_weights_grad(const ChannelWeightsGradParams& params, cudaStream_t stream) {
  return launch_tasks(channel_weights_grad, params.problem.num_pairs(), kThreads, 0, stream, params);
}

cudaError_t launch_channel_scale_sum(const ChannelProblem& p, const float* of_pairs, float* grad_head_scale,
                                     cudaStream_t stream) {
  return launch_tasks(channel_scale_sum, ceil_div<int64_t>(p.heads, kThreads), kThreads, 0, stream, p.batch, p.heads,
                      float(p.scale), of_pairs, grad_head_scale);
}

}  // namespace vitkernels
