// How a transform of any length is divided into stages. Plain data, no torch.
#pragma once

#include <cstdint>

namespace vitkernels {

// Stages of decimation in frequency, outermost first. A stage of radix r divides a span of n points into r spans, in
// place: frequency k + r q of the span becomes frequency q of the k-th of them.
struct MixedRadix {
  static constexpr int kMaxStages = 48;

  int64_t length = 1, max_prime = 0;  // of the radices without a kernel of their own, the largest
  int stages = 0;
  int64_t radix[kMaxStages] = {};

  explicit MixedRadix(int64_t length) : length(length) {
    int64_t rest = length, small = 1, power = length & -length;
    rest /= power;
    for (int64_t prime : {7, 5, 3}) {
      for (; rest % prime == 0; rest /= prime) small *= prime;
    }
    for (int64_t prime = 11; prime * prime <= rest; prime += 2) divide(rest, prime);
    if (rest > 1) divide(rest, rest);
    const bool has_14 = power == 2 && small % 7 == 0;
    if (has_14) small /= 7, power = 14;
    for (int64_t prime : {7, 5, 3}) divide(small, prime);
    while (power > 1) divide(power, power == 32 ? 4 : power <= 16 ? power : 8, 1);
  }

  static bool has_kernel(int64_t radix) { return radix <= 8 || radix == 14 || radix == 16; }

  // Where the last stage leaves a frequency.
  int64_t place(int64_t frequency) const {
    int64_t at = 0, n = length;
    for (int s = 0; s < stages; ++s) {
      n /= radix[s];
      at += frequency % radix[s] * n, frequency /= radix[s];
    }
    return at;
  }

  // Roots of a stage whose spans have n points: those of a prime radix, then the twiddles.
  int64_t roots(int s, int64_t n) const {
    return (has_kernel(radix[s]) ? 0 : radix[s]) + n / radix[s] * (radix[s] - 1);
  }
  int64_t roots() const {
    int64_t count = 0, n = length;
    for (int s = 0; s < stages; n /= radix[s++]) count += roots(s, n);
    return count;
  }

 private:
  void divide(int64_t& rest, int64_t by, int times = kMaxStages) {
    for (; times > 0 && rest % by == 0; rest /= by, --times) {
      radix[stages++] = by;
      if (!has_kernel(by) && by > max_prime) max_prime = by;
    }
  }
};

}  // namespace vitkernels
