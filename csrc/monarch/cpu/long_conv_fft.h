// The transforms of a long convolution: evaluation of polynomials at the roots of z^L = -i, and back.
//
// Lanes are channels, so nothing is shuffled. The order of the frequencies is whatever decimation in frequency leaves:
// a product does not mind, and decimation in time takes it back from there. The columns are transformed a vector's
// width of them at a time, on their way from the signal or to it; then rows, from which on a product is not far
// (multiply_row).
#pragma once

#include "monarch/cpu/dft.h"
#include "monarch/long_conv.h"

namespace vitkernels::VK_ISA {

template <class T>
class LongConvFft {
 public:
  static constexpr int64_t kN = kWidth<T>, kPoint = 2 * kN, kTile = kN * kN, kEnds = LongConvPlan::kEnds;

  LongConvFft(const LongConvPlan& plan, const void* roots) : plan(plan) {
    const T* next = static_cast<const T*>(roots);
    int64_t n = plan.length;
    for (int s = 0; s < plan.stages; n /= plan.radix[s++]) {
      stages[s] = {plan.radix[s], n, next};
      next += n / plan.radix[s] * (plan.radix[s] - (s > 0)) * 2;
    }
  }

  int64_t rows() const { return plan.rows; }
  int64_t size() const { return plan.rows * row_stride; }
  static constexpr int64_t tiles_size() { return 2 * kEnds * kTile; }
  T* row(T* data, int64_t r) const { return data + r * row_stride; }

  // From a signal to `data` [rows, columns] of points: load(position, real, imaginary) fills tiles [kN positions, kN].
  template <bool kIsComplex, class Load>
  void forward_columns(T* data, T* tiles, Load&& load) const {
    for (int64_t column = 0; column < plan.columns; column += kN) {
      for (int64_t r = 0; r < end_rows; ++r) {
        for (int64_t q = 0; q < kEnds; ++q) {
          load(position(q, r, column), tiles + q * kTile, tiles + (kEnds + q) * kTile);
        }
        first_stage<kIsComplex>(tiles, at(data, r, column), twiddles_of(0, r, column));
      }
      for (int s = 1; s < plan.column_stages; ++s) column_stage<false>(s, data, column);
    }
  }

  // The way back: store(position, real, imaginary).
  template <bool kIsComplex, class Store>
  void inverse_columns(T* data, T* tiles, Store&& store) const {
    for (int64_t column = 0; column < plan.columns; column += kN) {
      for (int s = plan.column_stages - 1; s > 0; --s) column_stage<true>(s, data, column);
      for (int64_t r = 0; r < end_rows; ++r) {
        last_stage<kIsComplex>(at(data, r, column), tiles, twiddles_of(0, r, column));
        for (int64_t q = 0; q < kEnds; ++q) {
          store(position(q, r, column), tiles + q * kTile, tiles + (kEnds + q) * kTile);
        }
      }
    }
  }

  // A row up to its last stage, and from there back.
  void forward_row(T* row) const {
    for (int s = plan.column_stages; s < plan.stages - 1; ++s) row_stage<false>(s, row);
  }
  void inverse_row(T* row) const {
    for (int s = plan.stages - 2; s >= plan.column_stages; --s) row_stage<true>(s, row);
  }

  // Calls f(points, offset) for what takes part in the last stage of a row together.
  template <class Function>
  void for_each_end(Function&& f) const {
    for (int64_t c = 0; c < plan.columns; c += kEnds) f(c * kPoint);
  }

 private:
  struct Stage {
    int radix;
    int64_t length;
    const T* twiddles;
  };

  int64_t position(int64_t q, int64_t r, int64_t column) const { return (q * end_rows + r) * plan.columns + column; }
  T* at(T* data, int64_t r, int64_t column) const { return data + r * row_stride + column * kPoint; }
  const T* twiddles_of(int s, int64_t r, int64_t column) const {
    return stages[s].twiddles + (r * plan.columns + column) * 2 * (stages[s].radix - (s > 0));
  }

  // exp(-i pi q / 16): the weight of the q-th point of the first stage, beyond that of its twiddles.
  static constexpr double kCosine[] = {1.0,
                                       0.980785280403230449126182236134239037,
                                       0.923879532511286756128183189396788287,
                                       0.831469612302545237078788377617905757,
                                       0.707106781186547524400844362104849039,
                                       0.555570233019602224742830813948532874,
                                       0.382683432365089771728459984030398867,
                                       0.195090322016128267848284868477022241};
  static constexpr double cosine(int q) { return kCosine[q]; }
  static constexpr double sine(int q) { return q == 0 ? 0.0 : -kCosine[8 - q]; }

  template <bool kIsComplex>
  VK_WHOLE void first_stage(const T* tiles, T* to, const T* twiddles) const {
    const int64_t stride = end_rows * row_stride;
    for (int64_t j = 0; j < kN; ++j, to += kPoint, twiddles += 2 * kEnds) {
      Points<T, kEnds> points;
#pragma GCC unroll 8
      for (int q = 0; q < kEnds; ++q) {
        const Vec<T> real = load(tiles + q * kTile + j * kN);
        if constexpr (kIsComplex) {
          points.re[q] = real, points.im[q] = load(tiles + (kEnds + q) * kTile + j * kN);
          if (q > 0) points.template rotate<false>(q, T(cosine(q)), T(sine(q)));
        } else {
          points.re[q] = q == 0 ? real : real * T(cosine(q));
          points.im[q] = q == 0 ? Vec<T>{} : real * T(sine(q));
        }
      }
      dft<false>(points);
#pragma GCC unroll 8
      for (int k = 0; k < kEnds; ++k) points.template rotate<false>(k, twiddles[2 * k], twiddles[2 * k + 1]);
      points.store(to, stride);
    }
  }

  template <bool kIsComplex>
  VK_WHOLE void last_stage(const T* from, T* tiles, const T* twiddles) const {
    const int64_t stride = end_rows * row_stride;
    for (int64_t j = 0; j < kN; ++j, from += kPoint, twiddles += 2 * kEnds) {
      Points<T, kEnds> points;
      points.load(from, stride);
#pragma GCC unroll 8
      for (int k = 0; k < kEnds; ++k) points.template rotate<true>(k, twiddles[2 * k], twiddles[2 * k + 1]);
      dft<true>(points);
#pragma GCC unroll 8
      for (int q = 0; q < kEnds; ++q) {
        if (q > 0) points.template rotate<true>(q, T(cosine(q)), T(sine(q)));
        store(tiles + q * kTile + j * kN, points.re[q]);
        if constexpr (kIsComplex) store(tiles + (kEnds + q) * kTile + j * kN, points.im[q]);
      }
    }
  }

  template <bool kInverse>
  void column_stage(int s, T* data, int64_t column) const {
    const int64_t span = stages[s].length / plan.columns, step = span / stages[s].radix;
    for (int64_t begin = 0; begin < plan.rows; begin += span) {
      for (int64_t r = 0; r < step; ++r) {
        butterflies<kInverse>(s, at(data, begin + r, column), step * row_stride, kN, twiddles_of(s, r, column));
      }
    }
  }

  template <bool kInverse>
  void row_stage(int s, T* row) const {
    const int64_t span = stages[s].length, step = span / stages[s].radix;
    for (int64_t begin = 0; begin < plan.columns; begin += span) {
      butterflies<kInverse>(s, row + begin * kPoint, step * kPoint, step, stages[s].twiddles);
    }
  }

  // `count` neighbors, each the first of points a stride apart.
  template <bool kInverse>
  void butterflies(int s, T* first, int64_t stride, int64_t count, const T* twiddles) const {
    switch (stages[s].radix) {
      case 2: return butterflies_of<2, kInverse>(first, stride, count, twiddles);
      case 3: return butterflies_of<3, kInverse>(first, stride, count, twiddles);
      case 4: return butterflies_of<4, kInverse>(first, stride, count, twiddles);
      default: return butterflies_of<8, kInverse>(first, stride, count, twiddles);
    }
  }

  template <int kRadix, bool kInverse>
  static VK_WHOLE void butterflies_of(T* first, int64_t stride, int64_t count, const T* twiddles) {
    for (int64_t j = 0; j < count; ++j, first += kPoint, twiddles += 2 * (kRadix - 1)) {
      Points<T, kRadix> points;
      points.load(first, stride);
      if constexpr (!kInverse) dft<false>(points);
#pragma GCC unroll 8
      for (int k = 1; k < kRadix; ++k) {
        points.template rotate<kInverse>(k, twiddles[2 * k - 2], twiddles[2 * k - 1]);
      }
      if constexpr (kInverse) dft<true>(points);
      points.store(first, stride);
    }
  }

  const LongConvPlan& plan;
  // An odd number of points keeps the points of a column in different cache sets.
  const int64_t row_stride = (plan.columns + 1) * kPoint, end_rows = plan.rows / kEnds;
  Stage stages[LongConvPlan::kMaxStages];
};

}  // namespace vitkernels::VK_ISA
