// Discrete Fourier transforms of a few points in registers, for as many signals as a vector has lanes.
#pragma once

#include "cpu/simd.h"
#include "monarch/dft.h"

namespace vitkernels::VK_ISA {

// A point is a vector of real and a vector of imaginary parts; forward means exp(-2 pi i / n).
template <class T, int kN>
struct Points {
  Vec<T> re[kN], im[kN];

  VK_INLINE void load(const T* p, int64_t stride) {
#pragma GCC unroll 16
    for (int k = 0; k < kN; ++k) re[k] = VK_ISA::load(p + k * stride), im[k] = VK_ISA::load(p + k * stride + kWidth<T>);
  }

  VK_INLINE void store(T* p, int64_t stride) const {
#pragma GCC unroll 16
    for (int k = 0; k < kN; ++k) {
      VK_ISA::store(p + k * stride, re[k]);
      VK_ISA::store(p + k * stride + kWidth<T>, im[k]);
    }
  }

  // Times (c, s) or its conjugate.
  template <bool kConjugate>
  VK_INLINE void rotate(int k, T c, T s) {
    const Vec<T> cosine = broadcast(c), sine = broadcast(s), a = re[k], b = im[k];
    re[k] = kConjugate ? a * cosine + b * sine : a * cosine - b * sine;
    im[k] = kConjugate ? b * cosine - a * sine : b * cosine + a * sine;
  }
};

template <bool kInverse, class T, int kN>
VK_INLINE void dft(Points<T, kN>& points) {
  dft<kInverse, kN, T, Vec<T>>(points.re, points.im);
}

}  // namespace vitkernels::VK_ISA
