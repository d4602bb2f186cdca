// The multiply-add of matrix products, by the type of the operands.
//
// float and double are multiplied one by one. bfloat16, where the CPU multiplies it, comes in pairs: each lane of a
// float32 sum takes two products at once. A group is what a lane takes.
#pragma once

#include "common/dtype.h"
#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

#if defined(__AVX512BF16__)
inline constexpr bool kMultipliesBFloat16 = true;
#else
inline constexpr bool kMultipliesBFloat16 = false;
#endif

// The type that tensors of S are multiplied in.
template <class S>
using Operand = std::conditional_t<kMultipliesBFloat16 && std::is_same_v<S, BFloat16>, BFloat16, Compute<S>>;

// The type that products of E are added up in.
template <class E>
using Sum = Compute<E>;

template <class E>
inline constexpr int kGroup = sizeof(Sum<E>) / sizeof(E);

// Elements in a vector of operands.
template <class E>
inline constexpr int kOperandWidth = kWidth<Sum<E>> * kGroup<E>;

template <class E>
struct Arithmetic {
  using Vector = Vec<E>;

  static VK_INLINE Vector load(const E* p) { return VK_ISA::load(p); }
  static VK_INLINE Vector broadcast(const E* p) { return VK_ISA::broadcast(*p); }
  static VK_INLINE Vec<E> multiply_add(Vec<E> sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<BFloat16> {
  using Vector = __m512bh;

  static VK_INLINE Vector load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static VK_INLINE Vector broadcast(const BFloat16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static VK_INLINE Vec<float> multiply_add(Vec<float> sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

}  // namespace vitkernels::VK_ISA
