// GELU and its derivative: x Phi(x), and Phi(x) + x phi(x), of the normal distribution and its density.
#pragma once

#include "cpu/math.h"

namespace vitkernels::VK_ISA {

template <class T>
struct Normal {
  Vec<T> distribution, density;
};

// For negative x, Phi(x) is the density times a slowly changing function of 1 / (1 - x / 4): no cancellation in the tail.
template <class T>
VK_INLINE Normal<T> normal(Vec<T> x) {
  const Vec<T> gauss = exp<T>(x * x * T(-0.5));
  Normal<T> result{.density = gauss * T(0.5 * std::numbers::inv_sqrtpi_v<double> * std::numbers::sqrt2_v<double>)};
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kWidth<T>; ++i)
      result.distribution[i] = 0.5 * std::erfc(x[i] * -0.5 * std::numbers::sqrt2_v<T>);
  } else {
    // Minimax in relative error, 1.2e-8, of exp(t^2 / 2) erfc(t / sqrt(2)) / 2 for t to 13.3, where the density vanishes.
    constexpr T kPolynomial[] = {-2.43623890e-05f, 1.00281369e-01f, 9.43930771e-02f,  1.23535937e-01f,
                                 -2.60311828e-02f, 3.14963920e-01f, -3.46052793e-01f, 4.04449615e-01f,
                                 -2.00207681e-01f, 3.46920942e-02f};
    const Vec<T> t = x < Vec<T>{} ? -x : x, u = T(1) / (t * T(0.25) + T(1));
    Vec<T> p = broadcast(kPolynomial[9]);
#pragma GCC unroll 9
    for (int i = 8; i >= 0; --i) p = p * u + kPolynomial[i];
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
