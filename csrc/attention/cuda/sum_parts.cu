// Sums that several blocks made in parts, added in order.

#include "attention/cuda/launches.h"
#include "cuda/launch.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kElements = 32, kLanes = 8;  // of a block

// Lane l of an element adds the parts l, l + kLanes, ...; then the lanes' sums are added.
__global__ void __launch_bounds__(kElements* kLanes)
    sum_parts(const __grid_constant__ PartialSums parts, int64_t elements, float* out) {
  __shared__ double sums[kLanes][kElements];
  const int i = int(threadIdx.x) % kElements, lane = int(threadIdx.x) / kElements;
  const int64_t element = int64_t(blockIdx.x) * kElements + i;
  double sum = 0.0;
  if (element < elements) {
    for (int64_t part = lane; part < parts.count; part += kLanes) {
      sum += double(parts.data[part * parts.stride + element]);
    }
  }
  sums[lane][i] = sum;
  __syncthreads();
  if (lane > 0 || element >= elements) return;
  for (int later = 1; later < kLanes; ++later) sum += sums[later][i];
  out[element] = float(sum);
}

}  // namespace

cudaError_t launch_sum_parts(const PartialSums& parts, int64_t elements, float* out, cudaStream_t stream) {
  return launch_tasks(sum_parts, ceil_div<int64_t>(elements, kElements), kElements * kLanes, 0, stream, parts, elements,
                      out);
}

}  // namespace vitkernels
