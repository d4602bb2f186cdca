// What a task of spectral gating, a group of channels, does in the forward and in the backward.
//
// Two rows of a map are the real and the imaginary parts of one transform. Their half spectra are told apart on the way
// to the columns, which are transformed there and back in place.
#pragma once

#include "cpu/interleave.h"
#include "monarch/cpu/long_conv_tiles.h"
#include "monarch/cpu/mixed_radix_dft.h"
#include "monarch/spectral_gating.h"

namespace vitkernels::VK_ISA {

// Points times others in memory, or times their conjugates.
template <class T, bool kConjugate>
struct MultiplyBy {
  const T* others;

  template <int kCount>
  VK_INLINE void operator()(Points<T, kCount>& points, int64_t at) const {
#pragma GCC unroll 16
    for (int k = 0; k < kCount; ++k) {
      const T* other = others + (at + k) * 2 * kWidth<T>;
      const Vec<T> a = points.re[k], b = points.im[k], c = load(other), s = load(other + kWidth<T>);
      points.re[k] = kConjugate ? a * c + b * s : a * c - b * s;
      points.im[k] = kConjugate ? b * c - a * s : b * c + a * s;
    }
  }
};

template <class S>
class SpectralGatingTask {
 public:
  using T = Compute<S>;
  using Dft = MixedRadixDft<T>;
  static constexpr int64_t kN = Dft::kN, kPoint = Dft::kPoint;

  SpectralGatingTask(const SpectralGatingProblem& problem, Scratch& scratch)
      : p(problem),
        of_columns(p.of_columns, p.roots, scratch),
        of_rows(p.of_rows, of_columns.roots_end(), scratch),
        row(scratch.take<T>((p.columns + kN) * kPoint)),
        tile(scratch.take<T>(kN * kN)),
        weight(scratch.take<T>(size())) {}

  // A spectrum [frequencies, rows] of points. An odd number of them keeps columns in different cache sets.
  int64_t size() const { return p.frequencies() * column_size(); }
  T* column(T* spectrum, int64_t k) const { return spectrum + k * column_size(); }
  const T* column(const T* spectrum, int64_t k) const { return spectrum + k * column_size(); }

  Range batches(int64_t task) const { return share_of({0, p.batch}, task % p.shares, p.shares); }

  // The weight, divided by what the transforms of rows and columns multiply by, unless the task before had the same
  // channels.
  void begin(int64_t task) {
    if (group == task / p.shares) return;
    group = task / p.shares;
    const T scale = T(0.5) / T(p.rows * p.columns);
    const auto read = [&]<class From>(From) {
      for (int64_t h = 0; h < p.rows; ++h) {
        for (int64_t k = 0; k < p.frequencies(); ++k) {
          Points<T, 1> point = load_weight(weight_at<From>(p.weight, h, k));
          point.re[0] *= scale, point.im[0] *= scale;
          point.store(column(weight, k) + p.column_places[h] * kPoint, 0);
        }
      }
    };
    p.is_weight_wide ? read(T{}) : read(S{});
  }

  // From a batch of maps to columns of their half spectra, times 2, and back.
  void read(const Maps& maps, int64_t batch, T* spectrum) const {
    for (int64_t h = 0; h < p.rows; h += 2) {
      read_row(maps, batch, h, row);
      if (h + 1 < p.rows) {
        read_row(maps, batch, h + 1, row + kN);
      } else {
        for (int64_t w = 0; w < p.columns; ++w) store(row + w * kPoint + kN, Vec<T>{});
      }
      prefetch_rows<0>(maps, batch, h + 2);
      of_rows.forward(row);
      tell_apart(h, spectrum);
    }
  }
  void write(const Maps& maps, int64_t batch, const T* spectrum) const {
    for (int64_t h = 0; h < p.rows; h += 2) {
      put_together(h, spectrum);
      prefetch_rows<1>(maps, batch, h);
      of_rows.inverse(row);
      write_row(maps, batch, h, row);
      if (h + 1 < p.rows) write_row(maps, batch, h + 1, row + kN);
    }
  }

  // To the gradient of the weight.
  void write_weight(const SpectralWeight& to, const T* spectrum) const {
    const auto write = [&]<class To>(To) {
      for (int64_t h = 0; h < p.rows; ++h) {
        for (int64_t k = 0; k < p.frequencies(); ++k) {
          Points<T, 1> point;
          point.load(column(spectrum, k) + p.column_places[h] * kPoint, 0);
          store_weight(weight_at<To>(to, h, k), point);
        }
      }
    };
    p.is_weight_wide ? write(T{}) : write(S{});
  }

  const SpectralGatingProblem& p;
  const Dft of_columns, of_rows;
  int64_t group = -1;

 private:
  // The frequency of one position of the weight, in the channels of the task.
  template <class W>
  struct Weights {
    W* data;
    int64_t channel_stride, part_stride;
  };

  int64_t column_size() const { return ((p.rows + 1) | 1) * kPoint; }
  int64_t first_channel() const { return group * p.channel_group; }
  int64_t channels() const { return std::min(p.channels - first_channel(), p.channel_group); }

  ChannelSignals<S> row_of(const Maps& maps, int64_t batch, int64_t h) const {
    S* data = static_cast<S*>(maps.data) + batch * maps.batch_stride + h * maps.row_stride;
    return {data + first_channel() * maps.channel_stride, maps.channel_stride, maps.column_stride, channels(),
            p.columns};
  }

  // Two rows that come next, of this map or the next one, to be read or written: their lines are so far apart that the
  // hardware does not see them coming.
  template <int kIsWritten>
  VK_INLINE void prefetch_rows(const Maps& maps, int64_t batch, int64_t h) const {
    if (h >= p.rows) h = 0, ++batch;
    if (batch >= p.batch) return;
    for (const int64_t end = std::min(h + 2, p.rows); h < end; ++h) {
      const auto next = row_of(maps, batch, h);
      const bool is_transposed = next.time_stride == 1;
      const int64_t lines = is_transposed ? next.channels : p.columns;
      const int64_t stride = is_transposed ? next.channel_stride : next.time_stride;
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(next.data + i * stride, kIsWritten, 3);
    }
  }

  // One part of each point of a row.
  void read_row(const Maps& maps, int64_t batch, int64_t h, T* part) const {
    const auto from = row_of(maps, batch, h);
    if (from.channel_stride == 1) {
      for_each_count([&](int64_t count) VK_BODY {
        for (int64_t w = 0; w < p.columns; ++w) {
          store(part + w * kPoint, load_widened<T>(from.data + w * from.time_stride, count));
        }
      });
      return;
    }
    for (int64_t first = 0; first < p.columns; first += kN) {
      load_tile(from, first, tile);
      for (int64_t w = 0; w < kN; ++w) store(part + (first + w) * kPoint, load(tile + w * kN));
    }
  }
  void write_row(const Maps& maps, int64_t batch, int64_t h, const T* part) const {
    const auto to = row_of(maps, batch, h);
    if (to.channel_stride == 1) {
      for_each_count([&](int64_t count) VK_BODY {
        for (int64_t w = 0; w < p.columns; ++w) {
          store_narrowed<T>(to.data + w * to.time_stride, load(part + w * kPoint), count);
        }
      });
      return;
    }
    for (int64_t first = 0; first < p.columns; first += kN) {
      for (int64_t w = 0; w < kN; ++w) store(tile + w * kN, load(part + (first + w) * kPoint));
      store_tile(to, first, tile);
    }
  }

  // f(count) for the channels of the task: for a whole vector a constant.
  template <class Function>
  VK_INLINE void for_each_count(Function&& f) const {
    channels() == kN ? f(kN) : f(channels());
  }

  // For real a and b, the spectrum of a + i b has those of a, as symmetric as a real signal's, and of i b.
  VK_WHOLE void tell_apart(int64_t h, T* spectrum) const {
    for (int64_t k = 0; k < p.frequencies(); ++k) {
      Points<T, 1> low, high;
      low.load(row + p.row_places[k] * kPoint, 0);
      high.load(row + p.row_places[k > 0 ? p.columns - k : 0] * kPoint, 0);
      Points<T, 2> both;
      both.re[0] = low.re[0] + high.re[0], both.im[0] = low.im[0] - high.im[0];
      both.re[1] = low.im[0] + high.im[0], both.im[1] = high.re[0] - low.re[0];
      both.store(column(spectrum, k) + h * kPoint, kPoint);
    }
  }
  VK_WHOLE void put_together(int64_t h, const T* spectrum) const {
    Points<T, 2> both;
    Points<T, 1> low, high;
    // Two frequencies of a real signal are real: their imaginary parts are ignored, as torch.fft does.
    for (int64_t k = 0; k < p.columns; k += (p.columns + 1) / 2) {
      if (k > 0 && 2 * k != p.columns) break;
      both.load(column(spectrum, k) + h * kPoint, kPoint);
      low.re[0] = both.re[0], low.im[0] = both.re[1];
      low.store(row + p.row_places[k] * kPoint, 0);
    }
    for (int64_t k = 1; 2 * k < p.columns; ++k) {
      both.load(column(spectrum, k) + h * kPoint, kPoint);
      low.re[0] = both.re[0] - both.im[1], low.im[0] = both.im[0] + both.re[1];
      high.re[0] = both.re[0] + both.im[1], high.im[0] = both.re[1] - both.im[0];
      low.store(row + p.row_places[k] * kPoint, 0);
      high.store(row + p.row_places[p.columns - k] * kPoint, 0);
    }
  }

  template <class W>
  Weights<W> weight_at(const SpectralWeight& of, int64_t h, int64_t k) const {
    W* data = static_cast<W*>(of.data) + h * of.row_stride + k * of.column_stride;
    return {data + first_channel() * of.channel_stride, of.channel_stride, of.part_stride};
  }

  template <class W>
  VK_INLINE Points<T, 1> load_weight(const Weights<W>& from) const {
    Points<T, 1> point{};
    if (channels() == kN && from.channel_stride == 2 && from.part_stride == 1) {
      Vec<T> parts[2] = {load_widened<T>(from.data, kN), load_widened<T>(from.data + kN, kN)};
      separate_vectors<2, T>(parts);
      point.re[0] = parts[0], point.im[0] = parts[1];
      return point;
    }
    for (int64_t c = 0; c < channels(); ++c) {
      const W* at = from.data + c * from.channel_stride;
      point.re[0][c] = load_widened<T>(at, 1)[0], point.im[0][c] = load_widened<T>(at + from.part_stride, 1)[0];
    }
    return point;
  }
  template <class W>
  VK_INLINE void store_weight(const Weights<W>& to, const Points<T, 1>& point) const {
    if (channels() == kN && to.channel_stride == 2 && to.part_stride == 1) {
      Vec<T> parts[2] = {point.re[0], point.im[0]};
      interleave_vectors<2, T>(parts);
      store_narrowed<T>(to.data, parts[0], kN), store_narrowed<T>(to.data + kN, parts[1], kN);
      return;
    }
    for (int64_t c = 0; c < channels(); ++c) {
      W* at = to.data + c * to.channel_stride;
      store_narrowed<T>(at, broadcast(point.re[0][c]), 1);
      store_narrowed<T>(at + to.part_stride, broadcast(point.im[0][c]), 1);
    }
  }

  T *const row, *const tile;

 public:
  T* const weight;  // a spectrum
};

}  // namespace vitkernels::VK_ISA
