// Softmax in few instructions, for operands of 16 bits.
#pragma once

#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// In a branch that is rarely taken: keeps the compiler from issuing it always, with predicates.
__device__ inline void rarely() { asm volatile("nanosleep.u32 0;" ::: "memory"); }

// exp2(x unit - offset) is one FMA and one exponential, and as good as exp2((x - max) unit) while the rounding of the
// offset is small: up to 2^-13 for offsets below this. Beyond, warps subtract first.
inline constexpr float kMaxExpOffset = 4096.0f;

// To about 2^-22, of numbers that are normal, zero, infinite or NaN.
__device__ inline float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The softmax of rows whose numbers are all in registers: one FMA and one exponential for each. Numbers times `unit`,
// which is positive, are logits to the base 2.
template <int kRows>
struct FastSoftmax {
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  float unit;
  float max[kRows], offset[kRows];
  float sum[kRows];  // of this thread's columns only, until total()

  __device__ explicit FastSoftmax(float unit) : unit(unit) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = kMinusInfinity, sum[r] = 0.0f;
  }

  // The maxima of this thread's columns, and then those of the rows.
  template <class Numbers>
  static __device__ void raise(float (&max)[kRows], const Numbers& numbers) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) max[r] = fmaxf(max[r], numbers(r, c));
    }
  }
  static __device__ void combine(float (&max)[kRows]) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = combine_quad(max[r], [](float a, float b) { return fmaxf(a, b); });
  }

  // Once `max` is known. Where an offset would be large, `subtract(row, x)` takes x from all numbers of each row first.
  template <class Subtract>
  __device__ void find_offsets(Subtract&& subtract) {
    float largest = 0.0f;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      offset[r] = max[r] * unit;
      largest = r == 0 ? fabsf(offset[r]) : fmaxf(largest, fabsf(offset[r]));
    }
    if (!__any_sync(kAllLanes, !(largest <= kMaxExpOffset))) return;
    rarely();
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      offset[r] = 0.0f;
      // inf - inf must not arise in a row that sees no key.
      subtract(r, max[r] == kMinusInfinity ? 0.0f : max[r]);
    }
  }

  // Numbers become exponentials relative to the maximum.
  template <class Numbers>
  __device__ void exponentiate(Numbers& numbers) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) numbers(r, c) = exp2_of(fmaf(numbers(r, c), unit, -offset[r]));
    }
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) sum[r] += numbers(r, c);
    }
  }

  // The same once `max` is known.
  template <class Numbers>
  __device__ void exponentiate_from_max(Numbers& numbers) {
    find_offsets([&](int r, float x) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) numbers(r, c) -= x;
    });
    exponentiate(numbers);
  }

  // Maxima become logits: numbers times `scale`.
  __device__ void total(float scale) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      max[r] *= scale;
      sum[r] = combine_quad(sum[r], [](float a, float b) { return a + b; });
    }
  }

  // A sum is zero, or one at least. NaN stays NaN.
  static __device__ float factor_of(float sum) { return sum == 0.0f ? 0.0f : approximate_reciprocal(sum); }
  // -inf for a row that sees no key, whose maximum that is.
  static __device__ float lse_of(float max, float sum) { return fmaf(approximate_log2(sum), kLn2, max); }
};

// The same of rows that arrive in tiles. The reference of a row, `max`, follows its maximum only when that has grown by
// more than kSlack, which saves most corrections of the accumulators: what they hold is at most 2^kSlack times larger.
template <int kRows>
struct FastOnlineSoftmax : FastSoftmax<kRows> {
  using Base = FastSoftmax<kRows>;
  using Base::kMinusInfinity, Base::max, Base::sum, Base::unit;
  static constexpr float kSlack = 8.0f;

  float slack;

  __device__ explicit FastOnlineSoftmax(float unit) : Base(unit), slack(kSlack / unit) {}

  // Numbers become exponentials relative to the row's reference; `rescale(row, factor)` corrects the accumulators.
  template <class Numbers, class Rescale>
  __device__ void exponentiate(Numbers& numbers, Rescale&& rescale) {
    float row_max[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) row_max[r] = max[r];
    Base::raise(row_max, numbers);
    Base::combine(row_max);
    bool grows = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) grows |= !(row_max[r] <= max[r] + slack);
    if (__any_sync(kAllLanes, grows)) {
      rarely();
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // inf - inf must not arise in a row that has seen no key yet.
        const float factor = exp2_of((max[r] - (row_max[r] == kMinusInfinity ? 0.0f : row_max[r])) * unit);
        max[r] = row_max[r];
        sum[r] *= factor;
        rescale(r, factor);
      }
    }
    Base::exponentiate_from_max(numbers);
  }
};

}  // namespace vitkernels::cuda
