// Where the points of a transform come from, and where they go.
#pragma once

#include "cuda/vector.h"
#include "monarch/cuda/long_conv_launches.h"

namespace vitkernels::cuda {

template <DType kDType>
using LongConvElement = std::conditional_t<kDType == DType::kFloat32, float,
                                           std::conditional_t<kDType == DType::kBFloat16, BFloat16, Float16>>;

// Channels of a batch of a tensor, which are real. Absent positions and channels are zeros.
template <class S>
struct SignalPoints {
  S* data;
  int64_t channel_stride, time_stride, channels, length;

  __device__ SignalPoints(const LongConvCudaParams& p, const Signals& tensor, int64_t batch, int64_t first_channel)
      : data(tensor.at<S>(batch, first_channel)),
        channel_stride(tensor.channel_stride),
        time_stride(tensor.time_stride),
        channels(p.channels - first_channel),
        length(p.length) {}

  __device__ float2 load(int channel, int position) const {
    const bool exists = position < length && channel < channels;
    return {exists ? widen(data[channel * channel_stride + position * time_stride]) : 0.0f, 0.0f};
  }
  __device__ void store(int channel, int position, float2 value) const {
    if (position >= length || channel >= channels) return;
    data[channel * channel_stride + position * time_stride] = narrow<S>(value.x);
  }
};

// Taps of channels. A lag below zero, which is z^L = -i of one that is larger by L, is imaginary.
template <class S>
struct TapPoints {
  S* data;
  int64_t channel_stride, tap_stride, channels, taps, first_lag, length;

  __device__ TapPoints(const LongConvCudaParams& p, const Signals& tensor, int64_t first_channel)
      : data(tensor.at<S>(0, first_channel)),
        channel_stride(tensor.channel_stride),
        tap_stride(tensor.time_stride),
        channels(p.channels - first_channel),
        taps(p.taps),
        first_lag(p.first_lag),
        length(p.plan.num_positions()) {}

  __device__ float2 load(int channel, int position) const {
    const int64_t tap = position - first_lag, behind = tap - length;
    return {exists(channel, tap) ? widen(data[channel * channel_stride + tap * tap_stride]) : 0.0f,
            exists(channel, behind) ? widen(data[channel * channel_stride + behind * tap_stride]) : 0.0f};
  }
  __device__ void store(int channel, int position, float2 value) const {
    const int64_t tap = position - first_lag, behind = tap - length;
    if (exists(channel, tap)) data[channel * channel_stride + tap * tap_stride] = narrow<S>(value.x);
    if (exists(channel, behind)) data[channel * channel_stride + behind * tap_stride] = narrow<S>(value.y);
  }

 private:
  __device__ bool exists(int channel, int64_t tap) const { return channel < channels && 0 <= tap && tap < taps; }
};

// Points that outer stages have left.
struct SpanPoints {
  float2* data;

  __device__ float2 load(int, int position) const { return data[position]; }
  __device__ void store(int, int position, float2 value) const { data[position] = value; }
};

}  // namespace vitkernels::cuda
