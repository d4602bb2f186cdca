// GELU and its derivative: x Phi(x), and Phi(x) + x phi(x), of the normal distribution and its density.
#pragma once

#include "common/normal.h"
#include "cpu/math.h"

namespace vitkernels::VK_ISA {

template <class T>
struct Normal {
  Vec<T> distribution, density;
};

// For negative x, Phi(x) is the density times a slowly changing function of 1 / (1 - x / 4): no cancellation in the
// tail.
template <class T>
VK_INLINE Normal<T> normal(Vec<T> x) {
  const Vec<T> gauss = exp<T>(x * x * T(-0.5));
  Normal<T> result{.density = gauss * T(0.5 * std::numbers::inv_sqrtpi_v<double> * std::numbers::sqrt2_v<double>)};
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kWidth<T>; ++i)
      result.distribution[i] = 0.5 * std::erfc(x[i] * -0.5 * std::numbers::sqrt2_v<T>);
  } else {
    const Vec<T> t = x < Vec<T>{} ? -x : x, u = T(1) / (t * T(0.25) + T(1));
    Vec<T> p = broadcast(T(normal_tail(kNormalTailDegree)));
#pragma GCC unroll 16
    for (int i = kNormalTailDegree - 1; i >= 0; --i) p = p * u + T(normal_tail(i));
    const Vec<T> tail = gauss * p;
    result.distribution = x < Vec<T>{} ? tail : T(1) - tail;
  }
  return result;
}

template <class T>
VK_INLINE Vec<T> gelu(Vec<T> x) {
  return x * normal<T>(x).distribution;
}

template <class T>
VK_INLINE Vec<T> gelu_derivative(Vec<T> x) {
  const Normal<T> at_x = normal<T>(x);
  return at_x.distribution + x * at_x.density;
}

}  // namespace vitkernels::VK_ISA
