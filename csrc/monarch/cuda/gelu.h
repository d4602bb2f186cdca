// GELU and its derivative on a GPU, as in csrc/cpu/gelu.h.
#pragma once

#include <cuda_runtime.h>

namespace vitkernels::cuda {

struct NormalOnDevice {
  float distribution, density;

  __device__ explicit NormalOnDevice(float x) {
    // Minimax in relative error, 1.2e-8, of exp(t^2 / 2) erfc(t / sqrt(2)) / 2 for t to 13.3.
    constexpr float kPolynomial[] = {-2.43623890e-05f, 1.00281369e-01f, 9.43930771e-02f,  1.23535937e-01f,
                                     -2.60311828e-02f, 3.14963920e-01f, -3.46052793e-01f, 4.04449615e-01f,
                                     -2.00207681e-01f, 3.46920942e-02f};
    constexpr float kInverseRootOfTwoPi = 0.398942280f;
    const float gauss = __expf(x * x * -0.5f), u = __fdividef(1.0f, fmaf(fabsf(x), 0.25f, 1.0f));
    float p = kPolynomial[9];
#pragma unroll
    for (int i = 8; i >= 0; --i) p = fmaf(p, u, kPolynomial[i]);
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
