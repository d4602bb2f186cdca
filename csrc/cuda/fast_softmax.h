// Online softmax in few instructions, for operands of 16 bits.
#pragma once

#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// In a branch that is rarely taken: keeps the compiler from issuing it always, with predicates.
__device__ inline void rarely() { asm volatile("nanosleep.u32 0;" ::: "memory"); }

// exp2(x unit - offset) is one FMA and one exponential, and as good as exp2((x - max) unit) while the rounding of the
// offset is small: up to 2^-13 for offsets below this. Beyond, warps subtract first.
inline constexpr float kMaxExpOffset = 4096.0f;

// One FMA and one exponential for each logit. Numbers times `unit`, which is positive, are logits to the base 2. The
// reference of a row follows its maximum only when that has grown by more than kSlack, which saves most corrections of
// the accumulators: what they hold is at most 2^kSlack times larger.
template <int kRows>
struct FastOnlineSoftmax {
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  static constexpr float kSlack = 8.0f;

  float unit, slack;
  float max[kRows], sum[kRows];  // max: the reference; sum: of this thread's columns only, until total()

  __device__ explicit FastOnlineSoftmax(float unit) : unit(unit), slack(kSlack / unit) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = kMinusInfinity, sum[r] = 0.0f;
  }

  // Numbers become exponentials relative to the row's reference; `rescale(row, factor)` corrects the accumulators.
  template <class Numbers, class Rescale>
  __device__ void exponentiate(Numbers& numbers, Rescale&& rescale) {
    float row_max[kRows], offset[kRows], largest = 0.0f;
    bool grows = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = max[r];
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) row_max[r] = fmaxf(row_max[r], numbers(r, c));
      row_max[r] = combine_quad(row_max[r], [](float a, float b) { return fmaxf(a, b); });
      grows |= !(row_max[r] <= max[r] + slack);
    }
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
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      offset[r] = max[r] * unit;
      largest = fmaxf(largest, fabsf(offset[r]));
    }
    if (__any_sync(kAllLanes, !(largest <= kMaxExpOffset))) {
      rarely();
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        offset[r] = 0.0f;
        CUTE_UNROLL
        for (int c = 0; c < cute::size<1>(numbers); ++c) {
          numbers(r, c) -= max[r] == kMinusInfinity ? 0.0f : max[r];
        }
      }
    }
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

  // The references become logits: numbers times `scale`.
  __device__ void total(float scale) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      max[r] *= scale;
      sum[r] = combine_quad(sum[r], [](float a, float b) { return a + b; });
    }
  }
};

}  // namespace vitkernels::cuda
