// Discrete Fourier transforms of a few points in a thread's registers.
#pragma once

#include "cuda/launch.h"

namespace vitkernels::cuda {

// a b, or a times the conjugate of b.
template <bool kConjugate>
__device__ __forceinline__ float2 product(float2 a, float2 b) {
  if constexpr (kConjugate) {
    return {a.x * b.x + a.y * b.y, a.y * b.x - a.x * b.y};
  } else {
    return {a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y};
  }
}

__device__ __forceinline__ float2 sum(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 difference(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }

// a times -i, or i if it is inverse.
template <bool kInverse>
__device__ __forceinline__ float2 quarter_turn(float2 a) {
  if constexpr (kInverse) {
    return {-a.y, a.x};
  } else {
    return {a.y, -a.x};
  }
}

template <bool kInverse>
__device__ __forceinline__ void dft(float2 (&x)[2]) {
  const float2 first = x[0];
  x[0] = sum(first, x[1]), x[1] = difference(first, x[1]);
}

template <bool kInverse>
__device__ __forceinline__ void dft(float2 (&x)[4]) {
  const float2 a = sum(x[0], x[2]), b = difference(x[0], x[2]), c = sum(x[1], x[3]),
               d = quarter_turn<kInverse>(difference(x[1], x[3]));
  x[0] = sum(a, c), x[1] = sum(b, d), x[2] = difference(a, c), x[3] = difference(b, d);
}

template <bool kInverse>
__device__ __forceinline__ void dft(float2 (&x)[8]) {
  constexpr float kRoot = 0.707106781186547524400844362104849039f;
  float2 even[4], odd[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) even[q] = sum(x[q], x[q + 4]), odd[q] = difference(x[q], x[q + 4]);
  const float2 turned1 = quarter_turn<kInverse>(odd[1]), turned3 = quarter_turn<kInverse>(odd[3]);
  odd[1] = {kRoot * (odd[1].x + turned1.x), kRoot * (odd[1].y + turned1.y)};
  odd[2] = quarter_turn<kInverse>(odd[2]);
  odd[3] = {kRoot * (turned3.x - odd[3].x), kRoot * (turned3.y - odd[3].y)};
  dft<kInverse>(even), dft<kInverse>(odd);
#pragma unroll
  for (int q = 0; q < 4; ++q) x[2 * q] = even[q], x[2 * q + 1] = odd[q];
}

}  // namespace vitkernels::cuda
