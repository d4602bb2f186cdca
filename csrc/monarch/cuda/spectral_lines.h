// What transforms of lines are made of: points, butterflies, roots of unity.
#pragma once

#include "cuda/launch.h"
#include "monarch/cuda/spectral_gating.h"
#include "monarch/dft.h"

namespace vitkernels::cuda {

// Times another point, or its conjugate.
template <bool kConjugate>
__device__ __forceinline__ float2 multiply(float2 a, float2 by) {
  return kConjugate ? float2{a.x * by.x + a.y * by.y, a.y * by.x - a.x * by.y}
                    : float2{a.x * by.x - a.y * by.y, a.y * by.x + a.x * by.y};
}

// Where the points of a butterfly lie.
struct Butterfly {
  float2 *even, *odd;  // the first two
  int step;            // between every other
  int j;               // which one of its span

  __device__ __forceinline__ float2& operator[](int q) const { return (q % 2 ? odd : even)[q / 2 * step]; }
};

// A few points of a signal in registers.
template <int kCount>
struct Points {
  float re[kCount], im[kCount];

  __device__ __forceinline__ float2 get(int q) const { return {re[q], im[q]}; }
  __device__ __forceinline__ void set(int q, float2 point) { re[q] = point.x, im[q] = point.y; }

  __device__ __forceinline__ void load(const Butterfly& from) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) set(q, from[q]);
  }
  __device__ __forceinline__ void store(const Butterfly& to) const {
#pragma unroll
    for (int q = 0; q < kCount; ++q) to[q] = get(q);
  }

  // With twiddles, but for a first butterfly, which has none.
  __device__ __forceinline__ void forward(const RadixStages::Stage& stage, const float2* roots, int j) {
    dft<false, kCount, float, float>(re, im);
    if (j > 0) rotate<false>(roots, j * stage.root_step);
  }
  __device__ __forceinline__ void inverse(const RadixStages::Stage& stage, const float2* roots, int j) {
    if (j > 0) rotate<true>(roots, j * stage.root_step);
    dft<true, kCount, float, float>(re, im);
  }

 private:
  template <bool kInverse>
  __device__ __forceinline__ void rotate(const float2* roots, int step) {
#pragma unroll
    for (int q = 1; q < kCount; ++q) set(q, multiply<kInverse>(get(q), roots[q * step]));
  }
};

// exp(-2 pi i k / length), rounded once from float64.
__device__ inline float2 root_of_unity(int k, int length) {
  double sine, cosine;
  sincospi(2.0 * k / length, &sine, &cosine);
  return {float(cosine), float(-sine)};
}

// Calls f.operator()<radix>() if there is a kernel.
template <class Function>
__device__ __forceinline__ bool with_radix(int radix, Function&& f) {
  switch (radix) {
    case 1: f.template operator()<1>(); return true;
    case 2: f.template operator()<2>(); return true;
    case 3: f.template operator()<3>(); return true;
    case 4: f.template operator()<4>(); return true;
    case 5: f.template operator()<5>(); return true;
    case 7: f.template operator()<7>(); return true;
    case 8: f.template operator()<8>(); return true;
    case 14: f.template operator()<14>(); return true;
    case 16: f.template operator()<16>(); return true;
    default: return false;
  }
}

}  // namespace vitkernels::cuda
