// The online softmax of rows whose masked numbers are finite, but beyond all others.
#pragma once

#include "cuda/fast_softmax.h"

namespace vitkernels::cuda {

// What is added to a masked number, and what no other reaches: logits are smaller than 2^124. A few of them, and one
// number, do not overflow.
inline constexpr float kMask = -0x1p125f, kNothing = kMask / 2;

// As FastOnlineSoftmax. A row has no reference before it has seen a number that is not masked: its exponentials are zero
// until then.
template <int kRows>
struct MaskedOnlineSoftmax : FastSoftmax<kRows> {
  using Base = FastSoftmax<kRows>;
  using Base::kMinusInfinity, Base::max, Base::sum, Base::unit;
  static constexpr float kSlack = FastOnlineSoftmax<kRows>::kSlack;

  float limit[kRows];  // a larger maximum becomes the reference

  __device__ explicit MaskedOnlineSoftmax(float unit) : Base(unit) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) max[r] = 0.0f, limit[r] = kNothing;
  }

  template <class Numbers, class Rescale>
  __device__ void exponentiate(Numbers& numbers, Rescale&& rescale) {
    float row_max[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) row_max[r] = kMinusInfinity;
    Base::raise(row_max, numbers);
    Base::combine(row_max);
    bool grows = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) grows |= row_max[r] > limit[r];
    if (__any_sync(kAllLanes, grows)) {
      rarely();
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float next = has_seen(r) ? fmaxf(max[r], row_max[r]) : row_max[r];
        if (!(next > kNothing)) continue;
        const float factor = has_seen(r) ? exp2_of((max[r] - next) * unit) : 0.0f;
        max[r] = next;
        limit[r] = next + kSlack / unit;
        sum[r] *= factor;
        rescale(r, factor);
      }
    }
    Base::exponentiate_from_max(numbers);
  }

  // As FastSoftmax.
  __device__ void total(float scale) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!has_seen(r)) max[r] = kMinusInfinity;
    }
    Base::total(scale);
  }

 private:
  __device__ bool has_seen(int r) const { return limit[r] > kNothing; }
};

}  // namespace vitkernels::cuda
