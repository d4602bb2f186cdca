// Online softmax of rows that arrive in tiles of columns, in the registers of a warp.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "cuda/launch.h"

namespace vitkernels::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// 2^x, flushed to zero below the normal numbers.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^(x - offset). The subtraction comes first: a mask may hold the lowest finite number, which times log2(e) overflows.
__device__ inline float exp_from(float x, float offset) { return exp2_of((x - offset) * kLog2e); }

// Reduces over the four lanes that share a row of an MMA accumulator.
template <class Combine>
__device__ float combine_quad(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(kAllLanes, x, 1));
  return combine(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The running softmax state of a thread's rows.
template <int kRows>
struct OnlineSoftmax {
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  float max[kRows], sum[kRows];  // sum: of this thread's columns only, until total()

  __device__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = kMinusInfinity, sum[r] = 0.0f;
  }

  // Logits become exponentials relative to the new maximum; `rescale(row, factor)` corrects the accumulators.
  template <class Logits, class Rescale>
  __device__ void exponentiate(Logits& logits, Rescale&& rescale) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float row_max = max[r];
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) row_max = fmaxf(row_max, logits(r, c));
      row_max = combine_quad(row_max, [](float a, float b) { return fmaxf(a, b); });
      // inf - inf must not arise in a row that has seen no key yet.
      const float offset = row_max == kMinusInfinity ? 0.0f : row_max;
      const float factor = exp_from(max[r], offset);
      max[r] = row_max;
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

  // Of a row whose exponentials relative to its maximum add up to `sum`: what its accumulators are multiplied by, and
  // its LSE. A row that saw no key is zero; NaN stays NaN.
  static __device__ float factor_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  static __device__ float lse_of(float max, float sum) {
    return sum == 0.0f ? kMinusInfinity : max + log2f(sum) * kLn2;
  }
};

}  // namespace vitkernels::cuda
