// Vectorised exponential and logarithm.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

#include "common/dtype.h"
#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

// Fits of 2^x on [-1/2, 1/2] for results that are rounded to a type. Their errors lie below its rounding: 1.7e-9 for float,
// 1.4e-18 for double, and 2.6e-6 for bfloat16, far below, since sums are taken before the rounding.
template <class Rounded>
inline constexpr std::array kExp2Polynomial = {
    1.0f, 0.6931472067f, 0.2402265092f, 0.05550327227f, 0.009618056679f, 0.001340042818f, 0.000154614447f};
template <>
inline constexpr std::array kExp2Polynomial<double> = {
    0.999999999999999997,   0.693147180559945309,   0.240226506959101596,    0.055504108664821627,
    0.00961812910758725667, 0.00133335581464064707, 0.000154035304637243542, 0.0000152527338415567726,
    1.32154325359123762e-6, 1.01780570877339411e-7, 7.07419429728852101e-9,  4.45581790833606449e-10};
template <>
inline constexpr std::array kExp2Polynomial<BFloat16> = {0.9999992614f, 0.6931218147f, 0.2402474483f, 0.05591786032f,
                                                         0.009570101911f};

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  static constexpr float kSmallest = -126.0f;     // below: zero, never a denormal
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
};
template <>
struct Exp2Constants<double> {
  static constexpr double kSmallest = -1022.0;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
};

template <class T>
inline constexpr T kLog2e = T(std::numbers::log2e_v<double>);

// 2^x for x < 128 (float) or 1024 (double), as exact as `Rounded` can be. Results below the smallest normal number are
// zero: denormals would slow every following matmul down, and -inf needs no case of its own.
template <class T, class Rounded = T>
VK_INLINE Vec<T> exp2(Vec<T> x) {
  using C = Exp2Constants<T>;
  const auto polynomial = [](Vec<T> f) VK_BODY {
    constexpr auto& kCoefficients = kExp2Polynomial<Rounded>;
    Vec<T> p = broadcast<T>(kCoefficients.back());
#pragma GCC unroll 12
    for (int i = int(kCoefficients.size()) - 2; i >= 0; --i) p = p * f + kCoefficients[i];
    return p;
  };
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, broadcast<T>(C::kSmallest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, polynomial(x - n), n);
  }
#endif
  const Vec<T> shifted = x + C::kRounder;
  const Vec<T> p = polynomial(x - (shifted - C::kRounder));
  // The integer part stands in the low bits of `shifted`: move it to the exponent and add.
  using Unsigned = typename VectorOf<T>::Unsigned;
  const Unsigned scaled = (Unsigned)p + ((Unsigned)shifted << C::kMantissa);
  // NaN stays NaN: its bits do not survive the addition.
  return x < broadcast<T>(C::kSmallest) ? Vec<T>{} : x == x ? (Vec<T>)scaled : x;
}

// e^x. Callers subtract the maximum first, in x itself: the difference of two large logits is exact, the difference
// of their multiples by log2(e) is not, and overflows near the largest number.
template <class T, class Rounded = T>
VK_INLINE Vec<T> exp(Vec<T> x) {
  return exp2<T, Rounded>(x * kLog2e<T>);
}

// The natural logarithm of normal numbers, infinity and NaN. float is within one unit in the last place.
template <class T>
VK_INLINE Vec<T> log(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kWidth<T>; ++i) x[i] = std::log(x[i]);
    return x;
  } else {
    // x = 2^n (1 + f), with 1 + f between the roots of 1/2 and 2; a minimax fit of (log(1 + f) - f + f^2 / 2) / f^3.
    constexpr T kPolynomial[] = {0.33333331346f,  -0.24999997020f, 0.20000715554f,  -0.16667802632f, 0.14249058068f,
                                 -0.12425687164f, 0.11685419828f,  -0.11479733884f, 0.06971611828f};
    constexpr uint32_t kRootOfHalf = 0x3f3504f3;
    using Unsigned = typename VectorOf<T>::Unsigned;  // lanes behind the last row hold anything
    const Bits<T> n = (Bits<T>)((Unsigned)x - kRootOfHalf) >> 23;
    const Vec<T> f = (Vec<T>)((Unsigned)x - ((Unsigned)n << 23)) - T(1), exponent = __builtin_convertvector(n, Vec<T>);
    Vec<T> p = broadcast(kPolynomial[8]);
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) p = p * f + kPolynomial[i];
    // log(2) in two parts, the first of few bits.
    const Vec<T> result = exponent * T(0.693359375) + ((p * f - T(0.5)) * (f * f) + exponent * T(-2.12194440e-4) + f);
    return x < broadcast(std::numeric_limits<T>::infinity()) ? result : x;
  }
}

}  // namespace vitkernels::VK_ISA
