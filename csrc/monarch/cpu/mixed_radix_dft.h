// Transforms of any length, of as many signals as a vector has lanes: n points, one behind the other.
//
// Lanes are channels, so nothing is shuffled. Decimation in frequency goes forward and leaves the frequencies in the
// order of its digits (MixedRadix::place); decimation in time starts from there and comes back.
#pragma once

#include "cpu/scratch.h"
#include "monarch/cpu/dft.h"
#include "monarch/mixed_radix.h"

namespace vitkernels::VK_ISA {

template <class T>
class MixedRadixDft {
 public:
  static constexpr int64_t kN = kWidth<T>, kPoint = 2 * kN;

  MixedRadixDft(const MixedRadix& plan, const void* roots, Scratch& scratch)
      : plan(plan), work(scratch.take<T>(plan.max_prime * kPoint)) {
    const T* next = static_cast<const T*>(roots);
    int64_t n = plan.length;
    for (int s = 0; s < plan.stages; n /= plan.radix[s++]) {
      stages[s] = {plan.radix[s], n, next};
      next += 2 * plan.roots(s, n);
    }
    end = next;
  }

  const T* roots_end() const { return end; }

  void forward(T* data) const {
    for (int s = 0; s < plan.stages; ++s) run_stage<false>(s, data);
  }
  void inverse(T* data) const {
    for (int s = plan.stages - 1; s >= 0; --s) run_stage<true>(s, data);
  }

  // There and back. f(points, at) changes some frequencies on the way, which are in registers: those from place `at`
  // on.
  template <class Function>
  void forward_and_inverse(T* data, Function&& f) const {
    const int last = plan.stages - 1;
    for (int s = 0; s < last; ++s) run_stage<false>(s, data);
    if (last < 0) return for_each_end<1>(data, f);
    const bool is_done = with_kernel(plan.radix[last], [&]<int kRadix>() { for_each_end<kRadix>(data, f); });
    if (!is_done) {
      run_stage<false>(last, data);
      for_each_end<1>(data, f);
      run_stage<true>(last, data);
    }
    for (int s = last - 1; s >= 0; --s) run_stage<true>(s, data);
  }

 private:
  struct Stage {
    int64_t radix, length;
    const T* roots;
  };

  // Calls f.operator()<radix>() if there is a kernel.
  template <class Function>
  static bool with_kernel(int64_t radix, Function&& f) {
    switch (radix) {
      case 2: f.template operator()<2>(); return true;
      case 3: f.template operator()<3>(); return true;
      case 4: f.template operator()<4>(); return true;
      case 5: f.template operator()<5>(); return true;
      case 7: f.template operator()<7>(); return true;
      case 8: f.template operator()<8>(); return true;
      case 14: f.template operator()<14>(); return true;
      case 16: f.template operator()<16>(); return true;
      default: return false;
    }
  }

  template <int kRadix, class Function>
  VK_WHOLE void for_each_end(T* data, Function& f) const {
    for (int64_t at = 0; at < plan.length; at += kRadix) {
      Points<T, kRadix> points;
      points.load(data + at * kPoint, kPoint);
      dft<false>(points);
      f(points, at);
      dft<true>(points);
      points.store(data + at * kPoint, kPoint);
    }
  }

  template <bool kInverse>
  void run_stage(int s, T* data) const {
    const Stage& stage = stages[s];
    for (int64_t begin = 0; begin < plan.length; begin += stage.length) {
      T* span = data + begin * kPoint;
      const bool is_done = with_kernel(stage.radix, [&]<int kRadix>() { butterflies<kRadix, kInverse>(stage, span); });
      if (!is_done) prime_butterflies<kInverse>(stage, span);
    }
  }

  template <int kRadix, bool kInverse>
  static VK_WHOLE void butterflies(const Stage& stage, T* data) {
    const int64_t count = stage.length / kRadix, stride = count * kPoint;
    const T* twiddles = stage.roots;
    Points<T, kRadix> points;  // the first has no twiddles
    points.load(data, stride);
    dft<kInverse>(points);
    points.store(data, stride);
    for (int64_t j = 1; j < count; ++j) {
      data += kPoint, twiddles += 2 * (kRadix - 1);
      points.load(data, stride);
      if constexpr (!kInverse) dft<false>(points);
#pragma GCC unroll 16
      for (int k = 1; k < kRadix; ++k) {
        points.template rotate<kInverse>(k, twiddles[2 * k - 2], twiddles[2 * k - 1]);
      }
      if constexpr (kInverse) dft<true>(points);
      points.store(data, stride);
    }
  }

  // Of a prime radix, from the sums and differences of points that lie symmetrically.
  template <bool kInverse>
  VK_NOINLINE void prime_butterflies(const Stage& stage, T* data) const {
    const int64_t radix = stage.radix, count = stage.length / radix, stride = count * kPoint, half = radix / 2;
    const T *roots = stage.roots, *twiddles = roots + 2 * radix;
    for (int64_t j = 0; j < count; ++j, data += kPoint, twiddles += 2 * (radix - 1)) {
      const auto rotate = [&](Points<T, 1>& point, int64_t k)
                              VK_BODY { point.template rotate<kInverse>(0, twiddles[2 * k - 2], twiddles[2 * k - 1]); };
      Points<T, 1> first, total;
      first.load(data, 0), total = first;
      for (int64_t q = 1; q <= half; ++q) {
        Points<T, 1> a, b;
        a.load(data + q * stride, 0), b.load(data + (radix - q) * stride, 0);
        if constexpr (kInverse) rotate(a, q), rotate(b, radix - q);
        Points<T, 2> pair;
        pair.re[0] = a.re[0] + b.re[0], pair.im[0] = a.im[0] + b.im[0];
        pair.re[1] = a.re[0] - b.re[0], pair.im[1] = a.im[0] - b.im[0];
        total.re[0] += pair.re[0], total.im[0] += pair.im[0];
        pair.store(work + 2 * (q - 1) * kPoint, kPoint);
      }
      total.store(data, 0);
      for (int64_t k = 1; k <= half; ++k) {
        Points<T, 1> even = first, odd{};
        for (int64_t q = 1, at = k; q <= half; ++q, at += at + k < radix ? k : k - radix) {
          Points<T, 2> pair;
          pair.load(work + 2 * (q - 1) * kPoint, kPoint);
          const Vec<T> c = broadcast(roots[2 * at]), s = broadcast(kInverse ? -roots[2 * at + 1] : roots[2 * at + 1]);
          even.re[0] += c * pair.re[0], even.im[0] += c * pair.im[0];
          odd.re[0] += s * pair.re[1], odd.im[0] += s * pair.im[1];
        }
        Points<T, 1> a, b;  // even + i odd and even - i odd
        a.re[0] = even.re[0] - odd.im[0], a.im[0] = even.im[0] + odd.re[0];
        b.re[0] = even.re[0] + odd.im[0], b.im[0] = even.im[0] - odd.re[0];
        if constexpr (!kInverse) rotate(a, k), rotate(b, radix - k);
        a.store(data + k * stride, 0), b.store(data + (radix - k) * stride, 0);
      }
    }
  }

  const MixedRadix& plan;
  T* const work;
  const T* end = nullptr;
  Stage stages[MixedRadix::kMaxStages];
};

}  // namespace vitkernels::VK_ISA
