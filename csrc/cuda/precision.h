// The precision of MMA operands: of float, tensor cores read eleven significant bits (TF32).
#pragma once

#include <cmath>
#include <cute/tensor.hpp>
#include <limits>

namespace vitkernels::cuda {

// Ties away from zero; overflow becomes infinite. The instruction leaves the 13 low bits undefined.
__device__ inline float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits & ~0x1fffu);
}

// 16-bit elements, which are exact.
struct WholeElements {
  template <class Fragment>
  static __device__ Fragment prepare(const Fragment& fragment) {
    return fragment;
  }
  template <class Mma, class A, class B, class Acc>
  static __device__ void multiply_add(const Mma& mma, const A& a, const B& b, Acc&& acc) {
    cute::gemm(mma, a, b, acc);
  }
};

struct RoundedToTf32 {
  template <class Fragment>
  static __device__ auto prepare(const Fragment& fragment) {
    cute::Tensor rounded = cute::make_fragment_like<float>(fragment);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(fragment); ++i) rounded(i) = round_to_tf32(fragment(i));
    return rounded;
  }
  template <class Mma, class A, class B, class Acc>
  static __device__ void multiply_add(const Mma& mma, const A& a, const B& b, Acc&& acc) {
    cute::gemm(mma, a, b, acc);
  }
};

// 3xTF32: an element is the sum of two TF32 numbers, to 23 bits, and x y = large large + large small + small large.
struct ThreeTimesTf32 {
  template <class Rounded>
  struct Parts {
    Rounded large, small;
    Rounded finite;  // `large`, or zero: infinity times a small part of zero would be NaN
  };

  template <class Fragment>
  static __device__ auto prepare(const Fragment& fragment) {
    using Rounded = decltype(cute::make_fragment_like<float>(fragment));
    Parts<Rounded> parts;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(fragment); ++i) {
      const float x = fragment(i), rounded = round_to_tf32(x);
      const bool is_infinite = fabsf(rounded) == std::numeric_limits<float>::infinity();
      parts.large(i) = is_infinite ? x : rounded;  // tensor cores truncate the largest numbers
      parts.finite(i) = is_infinite ? 0.0f : rounded;
      parts.small(i) = is_infinite ? 0.0f : round_to_tf32(x - rounded);
    }
    return parts;
  }

  // Tensor cores round accumulators towards zero, a bias that grows with the depth. So they sum one step's depth only,
  // and the FPU adds the steps (Ootomo and Yokota, 2022, section 3).
  template <class Mma, class A, class B, class Acc>
  static __device__ void multiply_add(const Mma& mma, const A& a, const B& b, Acc&& acc) {
    cute::Tensor step = cute::make_fragment_like(acc);
    cute::clear(step);
    cute::gemm(mma, a.small, b.finite, step);
    cute::gemm(mma, a.finite, b.small, step);
    cute::gemm(mma, a.large, b.large, step);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(acc); ++i) acc(i) += step(i);
  }
};

// Calls f(arithmetic) for products of `Element`.
template <class Element, class Function>
__device__ __forceinline__ void with_arithmetic(bool allow_tf32, Function&& f) {
  if constexpr (sizeof(Element) == 2) {
    f(WholeElements{});
  } else if (allow_tf32) {
    f(RoundedToTf32{});
  } else {
    f(ThreeTimesTf32{});
  }
}

}  // namespace vitkernels::cuda
