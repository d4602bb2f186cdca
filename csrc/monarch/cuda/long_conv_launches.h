// Launches of the long convolution on a GPU. Plain data, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "monarch/long_conv.h"

namespace vitkernels {

// How a transform is divided, for powers of two. A thread block transforms a group of channels at once, in shared
// memory: a first stage of radix 8, stages in between, a last one of radix 8; every thread has 8 points a turn in all of
// them. Longer transforms have outer stages before, of radix 8 in global memory, which leave spans that are transformed
// each by itself.
struct LongConvCudaPlan {
  static constexpr int kMaxStages = 8, kMaxThreads = 512, kMaxTurns = 2;
  static constexpr int kMinLogLength = 6, kMaxLogWhole = 13, kMaxLogSpan = 12, kMaxLogLength = 28;
  static constexpr int64_t kMinPoints = 2048, kMaxPoints = int64_t(8) * kMaxThreads * kMaxTurns;

  int log_length = kMinLogLength;
  int outer = 0;                 // stages
  int log_tile = kMinLogLength;  // of what they leave
  int log_group = 0;             // of the channels of a thread block
  bool is_interleaved = false;   // channels take turns in shared memory, as they do in a tensor (B, N, channels)
  int stages = 0;                // in between
  int log_radix[kMaxStages] = {};
  int roots_of_tile = 0, num_roots = 0;  // those of outer stages come first

  LongConvCudaPlan() = default;

  // For `length` positions, of elements of `element_bytes`. With channels last, a group fills the 32 bytes that memory
  // is read in, as long as its points fit. Fewer points than kMinPoints would make small thread blocks.
  LongConvCudaPlan(int64_t length, int64_t channels, bool is_channels_last, int64_t element_bytes) {
    while (num_positions() < length) ++log_length;
    for (log_tile = log_length; log_tile > (outer == 0 ? kMaxLogWhole : kMaxLogSpan); log_tile -= 3) ++outer;
    if (outer == 0) {
      is_interleaved = is_channels_last;
      const int64_t wanted = is_channels_last ? 32 / element_bytes : 1;
      const auto grows = [&](int64_t points) {
        return group() < channels && 2 * points <= kMaxPoints && (2 * points <= kMinPoints || group() < wanted);
      };
      while (grows(num_points())) ++log_group;
    }
    int log_span = log_length;
    for (int s = 0; s < outer; ++s, log_span -= 3) roots_of_tile += roots_of(log_span, 3, s == 0);
    num_roots = roots_of_tile + roots_of(log_span, 3, true);
    for (log_span -= 3; log_span > 3; log_span -= log_radix[stages++]) {
      log_radix[stages] = log_span % 3 == 0 ? 3 : std::min(log_span - 3, 2);
      num_roots += roots_of(log_span, log_radix[stages], false);
    }
  }

  VK_HOST_DEVICE int64_t num_positions() const { return int64_t(1) << log_length; }
  VK_HOST_DEVICE int64_t num_points() const { return int64_t(1) << (log_tile + log_group); }
  int64_t group() const { return int64_t(1) << log_group; }
  int64_t spans() const { return int64_t(1) << (log_length - log_tile); }
  int threads() const { return int(std::min<int64_t>(num_points() / 8, kMaxThreads)); }
  int turns() const { return int(num_points() / 8) / threads(); }
  int shared_bytes() const { return int(num_points()) * 2 * int(sizeof(float)); }

  // Roots of a stage, by frequency, then position. The first stage and the first one of a tile have one for each point,
  // the others for each point behind the first.
  static VK_HOST_DEVICE int roots_of(int log_span, int log_radix, bool has_all) {
    return (1 << log_span) - (has_all ? 0 : 1 << (log_span - log_radix));
  }
};

// A block of threads takes a group of channels, or a span of a channel, in a share of the batch.
struct LongConvCudaParams {
  LongConvCudaPlan plan;
  int64_t batch = 0, channels = 0, length = 0, taps = 0, first_lag = 0;
  int64_t groups = 0, shares = 1;
  Signals x{}, filter{}, out{};
  Signals grad_out{}, grad_x{}, grad_filter{};  // of the backward, whose grad_filter may be null

  // Complex numbers. Spectra are in the order of the threads that use them.
  float* roots = nullptr;          // [num_roots]
  float* spectrum = nullptr;       // [groups, num_points()], of the filter
  float* partial = nullptr;        // [shares, groups, num_points()], of the filter's gradient
  float* points = nullptr;         // [batch, groups, num_points()], where there are outer stages: of x, or of a result
  float* grad_points = nullptr;    // the same of a gradient
  float* filter_points = nullptr;  // [groups, num_points()]: the same of the filter, or of its gradient

  void set(const LongConvProblem& p, const LongConvCudaPlan& planned) {
    plan = planned;
    batch = p.batch, channels = p.channels, length = p.length, taps = p.taps, first_lag = p.first_lag;
    x = p.x, filter = p.filter;
    groups = (channels + plan.group() - 1) / plan.group() * plan.spans();
  }
};

// What an outer stage reads or writes.
enum class LongConvTensor { kX, kOut, kGradOut, kGradX, kFilter, kGradFilter };

template <DType kDType>
struct LongConvLaunches {
  // How many blocks of threads share the batch, by shapes alone: `elements` sums of each are added in order.
  static int64_t shares(const LongConvCudaParams& params, int64_t elements);
  // Writes the roots and the filter's spectrum, for the launches that follow.
  static cudaError_t prepare(const LongConvCudaParams& params, cudaStream_t stream);
  // All outer stages of a tensor: from it to its points, or for a result from these to it.
  static cudaError_t outer(const LongConvCudaParams& params, LongConvTensor tensor, cudaStream_t stream);
  static cudaError_t convolve(const LongConvCudaParams& params, cudaStream_t stream);
  static cudaError_t differentiate(const LongConvCudaParams& params, cudaStream_t stream);
};

}  // namespace vitkernels
