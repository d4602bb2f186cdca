// What a task of the long convolution, a group of channels, does in the forward and in the backward.
#pragma once

#include "cpu/scratch.h"
#include "monarch/cpu/long_conv_fft.h"
#include "monarch/cpu/long_conv_tiles.h"

namespace vitkernels::VK_ISA {

template <class S>
class LongConvTask {
 public:
  using T = Compute<S>;
  using Fft = LongConvFft<T>;
  using End = Points<T, Fft::kEnds>;  // points of a row's last stage

  LongConvTask(const LongConvProblem& problem, Scratch& scratch)
      : fft(*problem.plan, problem.twiddles),
        tiles(scratch.take<T>(Fft::tiles_size())),
        spectrum(scratch.take<T>(fft.size())),
        p(problem) {}

  Range batches(int64_t task) const { return share_of({0, p.batch}, task % p.shares, p.shares); }

  // The filter's spectrum, divided by the length, unless the task before had the same channels.
  void begin(int64_t task) {
    if (group == task / p.shares) return;
    group = task / p.shares;
    const auto load = [&](int64_t position, T* real, T* imaginary) {
      load_tile(taps(), position - p.first_lag, real);
      if (p.first_lag < 0) load_tile(taps(), position - p.plan->length - p.first_lag, imaginary);
    };
    if (p.first_lag < 0) fft.template forward_columns<true>(spectrum, tiles, load);
    if (p.first_lag == 0) fft.template forward_columns<false>(spectrum, tiles, load);
    const T scale = T(1) / T(p.plan->length);
    for (int64_t r = 0; r < fft.rows(); ++r) {
      T* row = fft.row(spectrum, r);
      fft.forward_row(row);
      fft.for_each_end([&](int64_t at) VK_BODY {
        End points = transformed(row + at);
        for (int k = 0; k < Fft::kEnds; ++k) points.re[k] *= scale, points.im[k] *= scale;
        points.store(row + at, Fft::kPoint);
      });
    }
  }

  // From a batch of a tensor to columns that are transformed, and back.
  void read(const Signals& tensor, int64_t batch, T* data) {
    const auto signals = of(tensor, batch, p.length);
    fft.template forward_columns<false>(data, tiles, [&](int64_t position, T* real, T*) {
      prefetch_tile<T>(signals, position + kWidth<T>);
      load_tile(signals, position, real);
    });
  }
  void write(const Signals& tensor, int64_t batch, T* data) {
    const auto signals = of(tensor, batch, p.length);
    fft.template inverse_columns<false>(
        data, tiles, [&](int64_t position, const T* real, const T*) { store_tile(signals, position, real); });
  }

  // To the gradient of the taps: lags below zero are in the imaginary part.
  template <class To>
  void write_taps(const ChannelSignals<To>& to, T* data) {
    const auto write = [&](int64_t position, const T* real, const T* imaginary) {
      store_tile(to, position - p.first_lag, real);
      if (p.first_lag < 0) store_tile(to, position - p.plan->length - p.first_lag, imaginary);
    };
    if (p.first_lag < 0) fft.template inverse_columns<true>(data, tiles, write);
    if (p.first_lag == 0) fft.template inverse_columns<false>(data, tiles, write);
  }

  ChannelSignals<S> of(const Signals& tensor, int64_t batch, int64_t size) const {
    const int64_t channel = group * p.channel_group;
    return {tensor.at<S>(batch, channel), tensor.channel_stride, tensor.time_stride,
            std::min(p.channels - channel, p.channel_group), size};
  }

  static VK_INLINE End transformed(const T* from) {
    End points;
    points.load(from, Fft::kPoint);
    dft<false>(points);
    return points;
  }

  // The product of points with others in memory, or with their conjugates.
  template <bool kConjugate>
  static VK_INLINE void multiply(End& points, const T* by) {
    End other;
    other.load(by, Fft::kPoint);
#pragma GCC unroll 8
    for (int k = 0; k < Fft::kEnds; ++k) {
      const Vec<T> a = points.re[k], b = points.im[k], c = other.re[k], s = other.im[k];
      points.re[k] = kConjugate ? a * c + b * s : a * c - b * s;
      points.im[k] = kConjugate ? b * c - a * s : b * c + a * s;
    }
  }

  const Fft fft;
  T *const tiles, *const spectrum;
  int64_t group = -1;

 private:
  ChannelSignals<S> taps() const { return of(p.filter, 0, p.taps); }

  const LongConvProblem& p;
};

}  // namespace vitkernels::VK_ISA
