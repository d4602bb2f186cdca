// Loads and stores that convert between a tensor's element type and the type of the arithmetic.
#pragma once

#include "common/dtype.h"
#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

VK_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
VK_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

VK_INLINE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

// float16 by hand: not every compiler has the type in C++. Exponents are rebiased from 15 to 127.
VK_INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
  if (exponent == 0) {
    const float value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t rebiased = exponent == 0x1f ? 0xff : exponent + 112;
  return float_of(sign | rebiased << 23 | fraction << 13);
}

VK_INLINE void narrow(float x, Float16* p) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  uint32_t half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= bits_of(65536.0f)) {
    half = 0x7c00;
  } else if (magnitude < bits_of(0x1p-14f)) {
    half = bits_of(float_of(magnitude) + 0.5f) -
           bits_of(0.5f);  // numbers near 0.5 are 2^-24 apart, as float16's denormals
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

// Whole vectors. NaN stays NaN.
VK_INLINE void narrow(Vec<float> v, BFloat16* p) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  using Unsigned = VectorOf<float>::Unsigned;
  const Unsigned bits = reinterpret_cast<Unsigned>(v), to_nearest_even = 0x7fff + ((bits >> 16) & 1);
  const Unsigned rounded = v == v ? (bits + to_nearest_even) >> 16 : 0x7fc0 - Unsigned{};
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(p, &halves, sizeof(halves));
#endif
}

VK_INLINE void narrow(Vec<float> v, Float16* p) {
#if defined(__AVX512F__)
  const __m256i packed = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &packed, sizeof(packed));
#elif defined(__AVX2__)
  const __m128i packed = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &packed, sizeof(packed));
#else
  for (int i = 0; i < kWidth<float>; ++i) narrow(v[i], p + i);
#endif
}

// `count` is at most kWidth<T>; lanes behind it become zero.
template <class T, class S>
VK_INLINE Vec<T> load_widened(const S* p, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    return count == kWidth<T> ? load(p) : load_partial(p, count);
  } else {
    S elements[kWidth<T>] = {};
    const S* source = p;
    if (count != kWidth<T>) {
      std::memcpy(elements, p, count * sizeof(S));
      source = elements;
    }
#if defined(__AVX512F__)
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    if constexpr (std::is_same_v<S, Float16>) return _mm512_cvtph_ps(packed);
    if constexpr (std::is_same_v<S, BFloat16>)
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
#elif defined(__AVX2__)
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    if constexpr (std::is_same_v<S, Float16>) return _mm256_cvtph_ps(packed);
    if constexpr (std::is_same_v<S, BFloat16>)
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
#else
    Vec<T> v;
    for (int i = 0; i < kWidth<T>; ++i) v[i] = widen(source[i]);
    return v;
#endif
  }
}

template <class T, class S>
VK_INLINE void store_narrowed(S* p, Vec<T> v, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    return count == kWidth<T> ? store(p, v) : store_partial(p, v, count);
  } else {
    if (count == kWidth<T>) return narrow(v, p);
    S elements[kWidth<T>];
    narrow(v, elements);
    std::memcpy(p, elements, count * sizeof(S));
  }
}

}  // namespace vitkernels::VK_ISA
