// Adds the parts of a state in a fixed order.

#include "cuda/launch.h"
#include "linear_attention/cuda/launches.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) linear_state_sum(const __grid_constant__ LinearStateSum s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.num_elements()) return;
  const int64_t row = i / (s.part.value_dim + 1), column = i - row * (s.part.value_dim + 1);
  const int64_t pair = row / s.part.head_dim, feature = row - pair * s.part.head_dim;
  const int64_t at = column < s.part.value_dim ? feature * s.part.pitch() + column : s.part.features() + feature;
  const float* part = s.parts + pair * s.part.size() + at;
  double sum = 0.0;
  for (int64_t split = 0; split < s.splits; ++split, part += s.pairs * s.part.size()) sum += double(*part);
  s.state[i] = float(sum) * s.factor + (s.other ? s.other[i] : 0.0f);
}

}  // namespace

cudaError_t launch_linear_state_sum(const LinearStateSum& s, cudaStream_t stream) {
  return launch_tasks(linear_state_sum, ceil_div<int64_t>(s.num_elements(), kThreads), kThreads, 0, stream, s);
}

}  // namespace vitkernels
