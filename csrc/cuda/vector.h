// Vectors of elements, widened to the type of the arithmetic and narrowed back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "common/dtype.h"

namespace vitkernels::cuda {

inline constexpr int kVectorBytes = 16;  // the widest load of a thread

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return __half2float(std::bit_cast<__half>(x)); }

template <class S>
__device__ inline S narrow(Compute<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return std::bit_cast<BFloat16>(__float2bfloat16_rn(x));
  } else if constexpr (std::is_same_v<S, Float16>) {
    return std::bit_cast<Float16>(__float2half_rn(x));
  } else {
    return x;
  }
}

template <class S, int kCount>
struct alignas(kCount * sizeof(S)) Elements {
  S values[kCount];
};

template <int kCount, class S>
__device__ inline Elements<S, kCount> load_elements(const void* tensor, int64_t offset) {
  return *reinterpret_cast<const Elements<S, kCount>*>(static_cast<const S*>(tensor) + offset);
}

template <class S, int kCount>
__device__ inline void store_elements(void* tensor, int64_t offset, const Elements<S, kCount>& elements) {
  *reinterpret_cast<Elements<S, kCount>*>(static_cast<S*>(tensor) + offset) = elements;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

}  // namespace vitkernels::cuda
