// Softmax of rows that come in tiles of columns, in the registers of a warp.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "cuda/launch.h"

namespace vitkernels::cuda {

inline constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// e^(x - offset). The difference first: a mask may hold the lowest finite number, which times log2(e) is none.
__device__ inline float exp_from(float x, float offset) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((x - offset) * kLog2e));
  return y;
}

// Of a row whose exponentials relative to its maximum have this sum. NaN stays NaN.
__device__ inline float lse_of(float max, float sum) {
  return sum == 0.0f ? -std::numeric_limits<float>::infinity() : max + log2f(sum) * kLn2;
}

// The four lanes that share a row of a tensor core's result.
template <class Combine>
__device__ float combine_quad(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <int kRows>
struct OnlineSoftmax {
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  float max[kRows], sum[kRows];  // sum: of this thread's columns only, until total()

  __device__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = kNothing, sum[r] = 0.0f;
  }

  // Logits become exponentials relative to the new maximum; `rescale(row, factor)` brings along what was added up before.
  template <class Logits, class Rescale>
  __device__ void exponentiate(Logits& logits, Rescale&& rescale) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float largest = max[r];
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) largest = fmaxf(largest, logits(r, c));
      largest = combine_quad(largest, [](float a, float b) { return fmaxf(a, b); });
      // A row that saw nothing yet must not give inf - inf.
      const float offset = largest == kNothing ? 0.0f : largest;
      const float factor = exp_from(max[r], offset);
      max[r] = largest;
      sum[r] *= factor;
      rescale(r, factor);
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) {
        logits(r, c) = exp_from(logits(r, c), offset);
        sum[r] += logits(r, c);
      }
    }
  }

  __device__ void total() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = combine_quad(sum[r], [](float a, float b) { return a + b; });
  }
};

}  // namespace vitkernels::cuda
