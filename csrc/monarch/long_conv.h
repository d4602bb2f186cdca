// Params of the long convolution. Plain data, no torch.
//
// y[t] = sum over lags l of tap(l) x[t - l], as a product of polynomials modulo z^L + i with L >= N. Such a product of
// two real signals is that modulo z^2L - (-1): the coefficients below L are the real part, those above are the
// imaginary part. So neither signal is padded to twice its length, and each batch has a transform of its own.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/range.h"

namespace vitkernels {

// A tensor [batch, channels, time] of any strides, in elements.
struct Signals {
  void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, time_stride = 0;

  template <class S>
  VK_HOST_DEVICE S* at(int64_t batch, int64_t channel) const {
    return static_cast<S*>(data) + batch * batch_stride + channel * channel_stride;
  }
};

// How a transform is divided: stages of small radices, outermost first. An array of `rows` x `columns` goes through the
// column stages a few columns at a time, and through the row stages a row at a time, which are the two factors of a
// Monarch matrix. The first and the last stage have radix 8.
struct LongConvPlan {
  static constexpr int kMaxStages = 24;
  static constexpr int64_t kEnds = 8, kMaxColumns = 128, kColumnUnit = 16;

  int64_t length = 0, rows = 0, columns = 0;
  int stages = 0, column_stages = 0;
  int radix[kMaxStages] = {};

  explicit LongConvPlan(int64_t least) {
    length = 128;
    while (length < least) length *= 2;
    if (length >= 512 && length / 4 * 3 >= least) length = length / 4 * 3;
    divide();
  }

  // Twiddles of all stages but the last, which has none: those of the first stage also hold its weights.
  int64_t twiddles() const {
    int64_t count = length, n = length / kEnds;
    for (int s = 1; s < stages - 1; n /= radix[s++]) count += n / radix[s] * (radix[s] - 1);
    return count;
  }

 private:
  void divide() {
    int inner[kMaxStages], count = 0;
    int64_t rest = length / (kEnds * kEnds);
    if (rest % 3 == 0) inner[count++] = 3, rest /= 3;
    while (rest > 1) {
      const int next = rest == 2 ? 2 : rest == 4 || rest == 16 ? 4 : 8;
      inner[count++] = next, rest /= next;
    }
    // The stages of a row: the longest one that the first-level cache holds twice.
    unsigned best = 0;
    for (unsigned subset = 0; subset < 1u << count; ++subset) {
      const int64_t n = product(inner, count, subset);
      if (n % kColumnUnit == 0 && n <= kMaxColumns && n > columns) columns = n, best = subset;
    }
    rows = length / columns;
    radix[stages++] = kEnds;
    for (int i = 0; i < count; ++i) {
      if (!(best >> i & 1)) radix[stages++] = inner[i];
    }
    column_stages = stages;
    for (int i = 0; i < count; ++i) {
      if (best >> i & 1) radix[stages++] = inner[i];
    }
    radix[stages++] = kEnds;
  }

  static int64_t product(const int* inner, int count, unsigned subset) {
    int64_t n = kEnds;
    for (int i = 0; i < count; ++i) n *= subset >> i & 1 ? inner[i] : 1;
    return n;
  }
};

struct LongConvProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, channels = 0, length = 0;
  int64_t taps = 0, first_lag = 0;  // tap j has the lag first_lag + j
  Signals x, filter;
  const LongConvPlan* plan = nullptr;
  const void* twiddles = nullptr;  // complex, in the type of the arithmetic
  int64_t channel_group = 0;       // channels of a task: the lanes of a vector
  int64_t shares = 1;              // of the batch, each a task

  int64_t groups() const { return (channels + channel_group - 1) / channel_group; }
  int64_t tasks() const { return groups() * shares; }
};

struct LongConvParams {
  LongConvProblem problem;
  Signals out;

  DType element_type() const { return problem.dtype; }
};

struct LongConvGradParams {
  LongConvProblem problem;
  Signals grad_out, grad_x;
  Signals grad_filter;      // null: not requested
  void* partial = nullptr;  // [tasks, taps, channel_group] in the type of the arithmetic, if there are shares

  DType element_type() const { return problem.dtype; }
};

}  // namespace vitkernels
