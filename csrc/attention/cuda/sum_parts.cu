// Adds partial sums in a fixed order.

#include "attention/cuda/launches.h"
#include "attention/cuda/tokens.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 256, kMaxLanes = 8;

// `lanes` threads share an element: lane l adds the parts l, l + lanes, ...; then the lanes' sums are added.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    sum_parts(const __grid_constant__ PartialSums parts, int64_t elements, Element* out, int lanes) {
  __shared__ double sum_of_lane[kThreads];
  const int width = kThreads / lanes, i = int(threadIdx.x) % width, lane = int(threadIdx.x) / width;
  const int64_t element = int64_t(blockIdx.x) * width + i;
  double sum = 0.0;
  if (element < elements) {
    for (int64_t part = lane; part < parts.count; part += lanes) sum += double(parts.part(part)[element]);
  }
  sum_of_lane[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || element >= elements) return;
  for (int later = 1; later < lanes; ++later) sum += sum_of_lane[later * width + i];
  out[element] = Element(float(sum));
}

}  // namespace

cudaError_t launch_sum_parts(const PartialSums& parts, int64_t elements, void* out, DType dtype, cudaStream_t stream) {
  const int lanes = parts.count < 2 * kMaxLanes ? 1 : kMaxLanes;  // a lane of its own must have some parts to add
  return dispatch_element(dtype, [&]<class Element>(Element) {
    return launch_tasks(sum_parts<Element>, ceil_div<int64_t>(elements, kThreads / lanes), kThreads, 0, stream, parts,
                        elements, static_cast<Element*>(out), lanes);
  });
}

}  // namespace vitkernels
