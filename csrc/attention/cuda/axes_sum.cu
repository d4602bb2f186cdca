// Sums over axes of a tensor: what rows of a gradient share.

#include "attention/cuda/spatial_launches.h"
#include "attention/cuda/tokens.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 128;
constexpr int64_t kFewElements = 4096;  // fewer take a warp each

struct Counts {
  int64_t kept = 1, summed = 1;

  VK_HOST_DEVICE explicit Counts(const AxesSum& s) {
    for (int a = 0; a < AxesSum::kAxes; ++a) (s.is_summed[a] ? summed : kept) *= s.size[a];
  }
};

// The distance of an element from the first one, where `index` counts those that differ in summed axes, or the others.
__device__ int64_t offset_of(const AxesSum& s, bool of_summed, int64_t index) {
  int64_t offset = 0, stride = 1;
  for (int a = AxesSum::kAxes - 1; a >= 0; --a) {
    if (s.is_summed[a] == of_summed) {
      const int64_t next = index / s.size[a];
      offset += (index - next * s.size[a]) * stride;
      index = next;
    }
    stride *= s.size[a];
  }
  return offset;
}

template <class Element, int kLanes>
__global__ void __launch_bounds__(kThreads) sum_axes(const __grid_constant__ AxesSum s) {
  const Counts count(s);
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = int(threadIdx.x) % kLanes;
  if (i >= count.kept) return;
  const float* const first = s.data + offset_of(s, false, i);
  double sum = 0.0;
  for (int64_t j = lane; j < count.summed; j += kLanes) sum += first[offset_of(s, true, j)];
  if constexpr (kLanes > 1) sum = warp_sum(sum);
  if (lane == 0) static_cast<Element*>(s.out)[i] = Element(float(sum));
}

}  // namespace

cudaError_t launch_axes_sum(const AxesSum& s, cudaStream_t stream) {
  const int64_t elements = Counts(s).kept;
  return dispatch_element(s.dtype, [&]<class Element>(Element) {
    if (elements < kFewElements) {
      return launch_tasks(sum_axes<Element, kWarpSize>, ceil_div<int64_t>(elements * kWarpSize, kThreads), kThreads, 0,
                          stream, s);
    }
    return launch_tasks(sum_axes<Element, 1>, ceil_div<int64_t>(elements, kThreads), kThreads, 0, stream, s);
  });
}

}  // namespace vitkernels
