// GELU and its derivative on a GPU, as in csrc/cpu/gelu.h.
#pragma once

#include <cuda_runtime.h>

#include "common/normal.h"

namespace vitkernels::cuda {

struct NormalOnDevice {
  float distribution, density;

  __device__ explicit NormalOnDevice(float x) {
    constexpr float kInverseRootOfTwoPi = 0.398942280f;
    const float gauss = __expf(x * x * -0.5f), u = __fdividef(1.0f, fmaf(fabsf(x), 0.25f, 1.0f));
    float p = normal_tail(kNormalTailDegree);
#pragma unroll
    for (int i = kNormalTailDegree - 1; i >= 0; --i) p = fmaf(p, u, normal_tail(i));
    const float tail = gauss * p;
    distribution = x < 0.0f ? tail : 1.0f - tail;
    density = gauss * kInverseRootOfTwoPi;
  }
};

__device__ inline float gelu(float x) { return x * NormalOnDevice(x).distribution; }

__device__ inline float gelu_derivative(float x) {
  const NormalOnDevice at_x(x);
  return fmaf(x, at_x.density, at_x.distribution);
}

}  // namespace vitkernels::cuda
