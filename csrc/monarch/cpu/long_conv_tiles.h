// Squares of a signal: kN positions of kN channels, in memory [positions, channels], from tensors of any strides.
#pragma once

#include "cpu/convert.h"
#include "monarch/long_conv.h"

namespace vitkernels::VK_ISA {

// The channels of a task, in one batch; `size` positions of each.
template <class S>
struct ChannelSignals {
  S* data;
  int64_t channel_stride, time_stride, channels, size;
};

// The part of a tile from position `first` on that is within [0, size).
template <class T>
VK_INLINE Range tile_range(int64_t first, int64_t size) {
  return {std::clamp<int64_t>(-first, 0, kWidth<T>), std::clamp<int64_t>(size - first, 0, kWidth<T>)};
}

// The tile that the next columns need: lines are so far apart that the hardware does not see them coming.
template <class T, class S>
VK_INLINE void prefetch_tile(const ChannelSignals<S>& signals, int64_t first) {
  const Range valid = tile_range<T>(first, signals.size);
  const bool is_transposed = signals.time_stride == 1;
  const S* p = signals.data + first * signals.time_stride;
  const int64_t lines = is_transposed ? (valid.empty() ? 0 : signals.channels) : valid.end;
  const int64_t stride = is_transposed ? signals.channel_stride : signals.time_stride;
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(p + i * stride, 0, 2);
}

// Positions beyond the signal's become zero, and so do absent channels.
template <class T, class S>
VK_INLINE void load_tile(const ChannelSignals<S>& signals, int64_t first, T* tile) {
  constexpr int kN = kWidth<T>;
  const Range valid = tile_range<T>(first, signals.size);
  const S* p = signals.data + first * signals.time_stride;
  const int64_t step = signals.channel_stride, time_step = signals.time_stride, channels = signals.channels;
  if (valid.begin == 0 && valid.end > 0 && time_step == 1 && step != 1) {
    Vec<T> square[kN];
#pragma GCC unroll 16
    for (int c = 0; c < kN; ++c) square[c] = c < channels ? load_widened<T>(p + c * step, valid.end) : Vec<T>{};
    transpose<T>(square);
#pragma GCC unroll 16
    for (int t = 0; t < kN; ++t) store(tile + t * kN, square[t]);
    return;
  }
  for (int64_t t = 0; t < kN; ++t) {
    Vec<T> point{};
    if (valid.contains(t) && step == 1) point = load_widened<T>(p + t * time_step, channels);
    if (valid.contains(t) && step != 1) {
      for (int64_t c = 0; c < channels; ++c) point[c] = load_widened<T>(p + t * time_step + c * step, 1)[0];
    }
    store(tile + t * kN, point);
  }
}

template <class T, class S>
VK_INLINE void store_tile(const ChannelSignals<S>& signals, int64_t first, const T* tile) {
  constexpr int kN = kWidth<T>;
  const Range valid = tile_range<T>(first, signals.size);
  S* p = signals.data + first * signals.time_stride;
  const int64_t step = signals.channel_stride, time_step = signals.time_stride, channels = signals.channels;
  if (valid.begin == 0 && valid.end > 0 && time_step == 1 && step != 1) {
    Vec<T> square[kN];
#pragma GCC unroll 16
    for (int t = 0; t < kN; ++t) square[t] = load(tile + t * kN);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int c = 0; c < kN; ++c) {
      if (c < channels) store_narrowed<T>(p + c * step, square[c], valid.end);
    }
    return;
  }
  for (int64_t t = valid.begin; t < valid.end; ++t) {
    const Vec<T> point = load(tile + t * kN);
    if (step == 1) {
      store_narrowed<T>(p + t * time_step, point, channels);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      store_narrowed<T>(p + t * time_step + c * step, broadcast(point[c]), 1);
    }
  }
}

}  // namespace vitkernels::VK_ISA
