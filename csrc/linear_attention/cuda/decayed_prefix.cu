// The states of decayed linear attention between the shares of a sequence on a GPU, in order.

#include "cuda/launch.h"
#include "linear_attention/cuda/decayed_launches.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

__device__ double power_of(double x, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2, x *= x) {
    if (exponent % 2 == 1) result *= x;
  }
  return result;
}

__global__ void __launch_bounds__(kThreads) decayed_prefix(const __grid_constant__ DecayedParams p, int splits) {
  const int64_t size = p.head_dim * p.value_dim, elements = p.num_pairs() * size;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  const double decay = static_cast<const float*>(p.decay)[i / size % p.heads];
  float* at = static_cast<float*>(p.chunk_states) + i;
  float before = p.initial_state ? static_cast<const float*>(p.initial_state)[i] : 0.0f;
  for (int split = 0; split < splits; ++split, at += elements) {
    const DecayedShare share(p, split, splits);
    int64_t exponent = split == 0 ? p.initial_exponent - 1 : 0;
    for (int tile = share.first; tile < share.end; ++tile) exponent += share.num_tokens(tile);
    const float sum = *at;
    *at = before;
    before = fmaf(before, float(power_of(decay, exponent)), sum);
  }
  static_cast<float*>(p.state)[i] = before;
}

__global__ void __launch_bounds__(kThreads) decay_once(const __grid_constant__ DecayedParams p, float* state) {
  const int64_t size = p.head_dim * p.value_dim, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.num_pairs() * size) state[i] *= static_cast<const float*>(p.decay)[i / size % p.heads];
}

int64_t num_blocks(const DecayedParams& p) {
  return ceil_div<int64_t>(p.num_pairs() * p.head_dim * p.value_dim, kThreads);
}

}  // namespace

cudaError_t launch_decayed_prefix(const DecayedParams& p, int64_t splits, cudaStream_t stream) {
  return launch_tasks(decayed_prefix, num_blocks(p), kThreads, 0, stream, p, int(splits));
}

cudaError_t launch_decay_once(const DecayedParams& p, float* state, cudaStream_t stream) {
  return launch_tasks(decay_once, num_blocks(p), kThreads, 0, stream, p, state);
}

}  // namespace vitkernels
