// Division by an invariant. Host and device, no torch.
#pragma once

#include "common/range.h"

namespace vitkernels {

// Division of numbers below 2^31 by an invariant, as a multiplication (Granlund and Montgomery, 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int divisor) {
    while (int64_t(1) << shift_ < divisor) ++shift_;
    multiplier_ = uint32_t(((uint64_t(1) << (31 + shift_)) + divisor - 1) / divisor);
  }
  VK_HOST_DEVICE int divide(int n) const { return int((uint64_t(uint32_t(n) * 2) * multiplier_) >> 32 >> shift_); }

 private:
  uint32_t multiplier_ = uint32_t(1) << 31;
  int shift_ = 0;
};

}  // namespace vitkernels
