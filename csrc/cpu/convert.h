// Loads and stores that convert between a tensor's element type and the type of the arithmetic.
#pragma once

#include "common/dtype.h"
#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

VK_INLINE float widen(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
VK_INLINE float widen(Float16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }

VK_INLINE void narrow(float x, BFloat16* p) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t to_nearest_even = 0x7fff + ((bits >> 16) & 1);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + to_nearest_even) >> 16);
}
VK_INLINE void narrow(float x, Float16* p) { p->bits = __builtin_bit_cast(uint16_t, _Float16(x)); }

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
    S elements[kWidth<T>];
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Float16>) {
      const __m256i packed = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(elements, &packed, sizeof(elements));
    } else {
#else
    {
#endif
      for (int i = 0; i < kWidth<T>; ++i) narrow(v[i], &elements[i]);
    }
    std::memcpy(p, elements, count * sizeof(S));
  }
}

}  // namespace vitkernels::VK_ISA
