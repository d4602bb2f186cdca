// The CPU's vectors: one set of names for every instruction set.
//
// The file is compiled once per instruction set, inside the namespace VK_ISA, so that code built for a newer
// machine can never be merged into code for an older one. Everything rests on the compiler's vector
// types; an intrinsic appears only where they have no word for the operation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VK_INLINE inline __attribute__((always_inline))
// In a function that it finds large, the compiler calls the bodies of loops: those of a hot loop are told to be part of
// it, and what few calls need stays out.
#define VK_BODY __attribute__((always_inline))
#define VK_NOINLINE __attribute__((noinline))
#define VK_WHOLE __attribute__((noinline, flatten))

namespace vitkernels::VK_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
inline constexpr int kWidth = kVectorBytes / int(sizeof(T));

template <class T>
struct VectorOf {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Value __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef Int Bits __attribute__((vector_size(kVectorBytes)));
  typedef std::make_unsigned_t<Int> Unsigned __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::Value;
template <class T>
using Bits = typename VectorOf<T>::Bits;

template <class T>
VK_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, -0.0 included
}

template <class T>
VK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(p);
}

template <class T>
VK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(p) = v;
}

// Calls f(first, count) for parts of kN elements, and for what is left. For whole parts `count` is a constant.
template <int kN, class Function>
VK_INLINE void for_each_part(int64_t elements, Function&& f) {
  int64_t first = 0;
  for (; first + kN <= elements; first += kN) f(first, int64_t(kN));
  if (first < elements) f(first, elements - first);
}

// The vector of f(lane) for constants, which a loop over the lanes would put together whenever they are needed.
template <class V, class Function>
VK_INLINE constexpr V constant_lanes(Function f) {
  using Lane = std::remove_reference_t<decltype(V{}[0])>;
  return [&]<std::size_t... kLane>(std::index_sequence<kLane...>)
             VK_BODY { return V{Lane(f(int(kLane)))...}; }(std::make_index_sequence<sizeof(V) / sizeof(Lane)>());
}

template <class T>
VK_INLINE constexpr Bits<T> lane_index() {
  return constant_lanes<Bits<T>>([](int lane) { return lane; });
}

// The first `count` lanes from memory, zero in the others; memory behind them is not touched.
template <class T>
VK_INLINE Vec<T> load_partial(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#endif
  Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

template <class T>
VK_INLINE void store_partial(T* p, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), v);
#endif
  std::memcpy(p, &v, count * sizeof(T));
}

template <class T>
VK_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_max_ps(a, b);
  if constexpr (sizeof(T) == 8) return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_max_ps(a, b);
  if constexpr (sizeof(T) == 8) return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// Lanes below `count` keep their value, the others become `other`.
template <class T>
VK_INLINE Vec<T> keep_first(Vec<T> v, int64_t count, T other) {
  const Bits<T> limit = typename VectorOf<T>::Int(count) - Bits<T>{};
  return lane_index<T>() < limit ? v : broadcast(other);
}

// What the lanes come to together, in every lane.
template <class T, class Combine>
VK_INLINE Vec<T> combine_lanes(Vec<T> v, Combine combine) {
#pragma GCC unroll 4
  for (int step = kWidth<T> / 2; step > 0; step /= 2) {
    v = combine(v, __builtin_shuffle(v, lane_index<T>() ^ typename VectorOf<T>::Int(step)));
  }
  return v;
}

template <class T>
VK_INLINE Vec<T> add_lanes(Vec<T> v) {
  return combine_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <class T>
VK_INLINE T reduce_add(Vec<T> v) {
  return add_lanes<T>(v)[0];
}

template <class T>
VK_INLINE T reduce_max(Vec<T> v) {
  return combine_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); })[0];
}

// In-register transpose of a square of vectors, by butterflies of 2x2 blocks.
template <class T>
VK_INLINE void transpose(Vec<T> (&rows)[kWidth<T>]) {
  constexpr int kN = kWidth<T>;
#pragma GCC unroll 4
  for (int step = 1; step < kN; step *= 2) {
    const Bits<T> low = constant_lanes<Bits<T>>([=](int i) { return i & step ? kN + i - step : i; });
    const Bits<T> high = constant_lanes<Bits<T>>([=](int i) { return i & step ? kN + i : i + step; });
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      if (i & step) continue;
      const Vec<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace vitkernels::VK_ISA
