// Launches of spectral gating on a GPU. Plain data, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "common/divisor.h"
#include "monarch/spectral_gating.h"

namespace vitkernels {

// The stages of a MixedRadix as a kernel needs them. The even radices come first, so that butterflies of the last stage
// are an odd number of points apart: in different banks. The first one reads, and the last one is left for something
// between there and back: where a prime without a kernel would be one of these, a stage of radix 1 is in its place.
struct RadixStages {
  static constexpr int kMaxStages = 16;

  struct Stage {
    int radix = 1;
    int count = 1;        // spans have radix x count points; those of a butterfly lie `count` apart
    int butterflies = 1;  // of all spans
    int root_step = 1;    // the root of a span's length is this power of that of the whole length
    int slot_step = 1;    // `count` with the padding of a line
    Divisor by_count{}, by_butterflies{};
  };

  int length = 1, stages = 0, max_prime = 0;
  Stage stage[kMaxStages]{};

  RadixStages() = default;
  explicit RadixStages(const MixedRadix& plan) : length(int(plan.length)), max_prime(int(plan.max_prime)) {
    int n = length;
    for (const int is_odd : {0, 1}) {
      for (int s = 0; s < plan.stages; ++s) {
        if (plan.radix[s] % 2 == is_odd) add(int(plan.radix[s]), n);
      }
    }
    if (stages == 0 || !MixedRadix::has_kernel(last().radix)) add(1, n);
  }

  VK_HOST_DEVICE const Stage& last() const { return stage[stages - 1]; }

  // Where the last stage leaves a frequency.
  VK_HOST_DEVICE int place(int frequency) const {
    int at = 0, n = length;
    for (int s = 0; s < stages; ++s) {
      n /= stage[s].radix;
      at += frequency % stage[s].radix * n, frequency /= stage[s].radix;
    }
    return at;
  }

 private:
  // A stage whose spans have n points.
  void add(int radix, int& n) {
    if (stages == 0 && !MixedRadix::has_kernel(radix)) add(1, n);
    const int root_step = length / n, butterflies = length / radix;
    n /= radix;
    stage[stages++] = {radix, n, butterflies, root_step, n, Divisor(n), Divisor(butterflies)};
  }
};

struct SpectralGatingCudaParams {
  int64_t batch = 0, channels = 0;
  int rows = 0, columns = 0;
  Maps x{}, out{};  // in the backward the gradients of the output and of x
  Maps saved_x{};   // of the forward, where the gradient of the weight is wanted; else null
  SpectralWeight weight{};
  bool is_weight_wide = false;
  bool is_weight_packed = false;  // parts are neighbours, and begin where a vector of both may
  bool is_conjugate = false;      // the weight is: in the backward
  float* parts = nullptr;         // [shares, rows, columns / 2 + 1, channels, 2]: the weight's gradient from each share

  int64_t shares = 1;  // of the batch, a thread block each. By shapes alone: parts are added in order

  // How a thread block is laid out for the current device; results do not depend on it. Set by plan().
  RadixStages of_columns{}, of_rows{};
  int log_group = 0, threads = 0;  // of its channels; the threads
  int line = 0;                    // slots of two rows of a map in shared memory, each a point
  bool is_resident = false;        // the weight and the sums of its gradient are there, too
  int shared_bytes = 0, shared_limit = 0;
  Divisor by_frequencies{}, by_padding{};

  // Columns of one stage: a thread reads all of one, and tells the spectra of the rows apart by itself.
  VK_HOST_DEVICE bool has_short_columns() const { return of_columns.stages == 1; }

  VK_HOST_DEVICE int frequencies() const { return columns / 2 + 1; }
  VK_HOST_DEVICE int pairs() const { return (rows + 1) / 2; }
  VK_HOST_DEVICE int64_t groups() const { return (channels + (1 << log_group) - 1) >> log_group; }
  VK_HOST_DEVICE int64_t weight_elements() const { return int64_t(rows) * frequencies() * channels * 2; }
};

// Of a thread block. Each computes two outputs of a prime radix at a time.
inline constexpr int kMaxSpectralThreads = 512;
inline constexpr int kMaxSpectralPrime = 2 * kMaxSpectralThreads - 1;
// Of a map: more than shared memory holds.
inline constexpr int64_t kMaxSpectralPositions = int64_t(1) << 20;

template <DType kDType>
struct SpectralGatingLaunches {
  // Into how many shares the batch is divided, by shapes alone.
  static int64_t shares(const SpectralGatingCudaParams& params);
  // Lays out a thread block. `shared_bytes` above `shared_limit`: the maps are too large for the device.
  static cudaError_t plan(SpectralGatingCudaParams& params);
  static cudaError_t run(const SpectralGatingCudaParams& params, cudaStream_t stream);
};

}  // namespace vitkernels
