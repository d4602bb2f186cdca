// Transforms of the maps of a few channels, in the shared memory of a thread block.
//
// Two rows of a map are the real and the imaginary parts of one line of points. A line is transformed in place; then the
// spectra of its rows are told apart in place: a pair of mirrored frequencies becomes one frequency of each row.
#pragma once

#include "cuda/scheduler.h"
#include "cuda/vector.h"
#include "monarch/cuda/spectral_slots.h"

namespace vitkernels::cuda {

template <class Element>
class SpectralBlock : public SpectralSlots {
 public:
  using SpectralSlots::SpectralSlots;

  // From maps to columns of their rows' half spectra, times 2, whose last stage is left, unless they are to be whole.
  // Short columns have that stage only, and are left as the rows leave them.
  __device__ __forceinline__ void forward(const Maps& maps, int64_t batch, float2* map, bool is_whole) const {
    read(maps, batch, map);
    const int of_rows = p.of_rows.stages - 1;
    const int stages = of_rows + (p.has_short_columns() ? 0 : p.of_columns.stages - !is_whole);
    for (int s = 0; s <= stages; ++s) {
      __syncthreads();
      if (s == of_rows && !p.has_short_columns()) tell_apart(map);
      if (s < of_rows) {
        run_stage<false>(true, p.of_rows.stage[s + 1], map);
      } else if (s < stages) {
        run_stage<false>(false, p.of_columns.stage[s - of_rows], map);
      }
    }
  }

  // And back.
  __device__ __forceinline__ void inverse(const Maps& maps, int64_t batch, float2* map) const {
    const int of_rows = p.of_rows.stages - 1, of_columns = p.of_columns.stages - 1;
    for (int s = of_columns + of_rows; s >= 0; --s) {
      __syncthreads();
      if (s == of_rows && !p.has_short_columns()) put_together(map);
      if (s > of_rows) {
        run_stage<true>(false, p.of_columns.stage[s - of_rows - 1], map);
      } else if (s > 0) {
        run_stage<true>(true, p.of_rows.stage[s], map);
      }
    }
    write(maps, batch, map);
  }

  // The last stage of columns, there and back. f(points, k, place, load) changes some frequencies on the way, which are
  // in registers: those of column k from a place on. `load` loads the same of another whole map.
  template <class Function>
  __device__ __forceinline__ void change_columns(float2* map, Function&& f) const {
    p.has_short_columns() ? change_short_columns(map, f) : change_long_columns(map, f);
  }

 private:
  __device__ int64_t offset(const Maps& maps, int64_t batch) const {
    return batch * maps.batch_stride + channel * maps.channel_stride;
  }
  template <class Function>
  __device__ __forceinline__ void change_long_columns(float2* map, Function& f) const {
    const Stage& stage = p.of_columns.last();
    with_radix(stage.radix, [&]<int kRadix>() __attribute__((always_inline)) {
      for_each(p.frequencies() * stage.butterflies, [&](int i) __attribute__((always_inline)) {
        const int b = p.by_frequencies.divide(i), k = i - b * p.frequencies();
        const Butterfly butterfly = column_butterfly(b * kRadix, 1, 0, k, map);
        Points<kRadix> points;
        points.load(butterfly);
        points.forward(stage, nullptr, 0);
        f(points, k, b * kRadix, [&](Points<kRadix>& other, int offset) __attribute__((always_inline)) {
          other.load({butterfly.even + offset, butterfly.odd + offset, butterfly.step, 0});
        });
        points.inverse(stage, nullptr, 0);
        points.store(butterfly);
      });
    });
  }
  template <class Function>
  __device__ __forceinline__ void change_short_columns(float2* map, Function& f) const {
    const Stage& stage = p.of_columns.last();
    with_radix(stage.radix, [&]<int kRadix>() __attribute__((always_inline)) {
      for_each(p.frequencies(), [&](int k) __attribute__((always_inline)) {
        const auto load = [&](Points<kRadix>& points, int offset) __attribute__((always_inline)) {
          load_short(points, k, map + offset);
          points.forward(stage, nullptr, 0);
        };
        Points<kRadix> points;
        load(points, 0);
        f(points, k, 0, load);
        points.inverse(stage, nullptr, 0);
        store_short(points, k, map);
      });
    });
  }
  // As tell_apart() and put_together(), of all rows.
  template <int kRows>
  __device__ __forceinline__ void load_short(Points<kRows>& points, int k, const float2* map) const {
    const float2 *low = map + low_slot(k), *high = map + high_slot(k);
#pragma unroll
    for (int h = 0; h < kRows; h += 2, low += p.line << p.log_group, high += p.line << p.log_group) {
      const auto [even, odd] = rows_of(*low, *high);
      points.set(h, even);
      if (h + 1 < kRows) points.set(h + 1, odd);
    }
  }
  template <int kRows>
  __device__ __forceinline__ void store_short(const Points<kRows>& points, int k, float2* map) const {
    float2 *low = map + low_slot(k), *high = map + high_slot(k);
    const bool is_real = low == high;
#pragma unroll
    for (int h = 0; h < kRows; h += 2, low += p.line << p.log_group, high += p.line << p.log_group) {
      const Both both = line_of(points.get(h), h + 1 < kRows ? points.get(h + 1) : float2{}, is_real);
      *low = both.first;
      if (!is_real) *high = both.second;
    }
  }

  // The first stage of rows: from maps.
  __device__ __forceinline__ void read(const Maps& maps, int64_t batch, float2* map) const {
    const Element* const from = static_cast<const Element*>(maps.data) + offset(maps, batch);
    for_each_first_butterfly([&]<int kRadix>(const Stage& stage, int i, int h) __attribute__((always_inline)) {
      const Butterfly to = row_butterfly(stage, i, map);
      const bool has_next = h + 1 < p.rows;
      const Element* at = from + h * maps.row_stride + to.j * maps.column_stride;
      Points<kRadix> points;
#pragma unroll
      for (int q = 0; q < kRadix; ++q, at += stage.count * maps.column_stride) {
        points.set(q, {widen(*at), has_next ? widen(at[maps.row_stride]) : 0.0f});
      }
      points.forward(stage, roots(true), to.j);
      points.store(to);
    });
  }
  // And back. The thread that reads a butterfly of the next map is the one that wrote it: nobody waits in between.
  __device__ __forceinline__ void write(const Maps& maps, int64_t batch, float2* map) const {
    Element* const to = static_cast<Element*>(maps.data) + offset(maps, batch);
    for_each_first_butterfly([&]<int kRadix>(const Stage& stage, int i, int h) __attribute__((always_inline)) {
      const Butterfly from = row_butterfly(stage, i, map);
      Points<kRadix> points;
      points.load(from);
      points.inverse(stage, roots(true), from.j);
      const bool has_next = h + 1 < p.rows;
      Element* at = to + h * maps.row_stride + from.j * maps.column_stride;
#pragma unroll
      for (int q = 0; q < kRadix; ++q, at += stage.count * maps.column_stride) {
        *at = narrow<Element>(points.re[q]);
        if (has_next) at[maps.row_stride] = narrow<Element>(points.im[q]);
      }
    });
  }
  // Calls f.operator()<radix>(stage, i, h) for butterflies of rows h and h + 1.
  template <class Function>
  __device__ __forceinline__ void for_each_first_butterfly(Function&& f) const {
    const Stage& stage = p.of_rows.stage[0];
    with_radix(stage.radix, [&]<int kRadix>() __attribute__((always_inline)) {
      for_each(p.pairs() * stage.butterflies, [&](int i) __attribute__((always_inline)) {
        f.template operator()<kRadix>(stage, i, 2 * stage.by_butterflies.divide(i));
      });
    });
  }

  __device__ __forceinline__ void tell_apart(float2* map) const {
    for_each_pair_of_slots(map, [&](float2* low, float2* high, float2* odd) __attribute__((always_inline)) {
      const Both both = rows_of(*low, *high);
      *low = both.first, *odd = both.second;
    });
  }
  __device__ __forceinline__ void put_together(float2* map) const {
    for_each_pair_of_slots(map, [&](float2* low, float2* high, float2* odd) __attribute__((always_inline)) {
      const Both both = line_of(*low, *odd, low == high);
      *low = both.first;
      if (low != high) *high = both.second;
    });
  }
  // A stage of all rows or columns in place, between waits for the others.
  template <bool kInverse>
  __device__ __forceinline__ void run_stage(bool is_rows, const Stage& stage, float2* map) const {
    const int count = (is_rows ? p.pairs() : p.frequencies()) * stage.butterflies;
    const float2* const roots = this->roots(is_rows);
    const bool is_done = with_radix(stage.radix, [&]<int kRadix>() __attribute__((always_inline)) {
      for_each(count, [&](int i) __attribute__((always_inline)) {
        const Butterfly of_i = butterfly(is_rows, stage, i, map);
        Points<kRadix> points;
        points.load(of_i);
        if constexpr (kInverse) {
          points.inverse(stage, roots, of_i.j);
        } else {
          points.forward(stage, roots, of_i.j);
        }
        points.store(of_i);
      });
    });
    if (!is_done) prime_stage<kInverse>(is_rows, stage, count, roots, map);
  }

  // Of a prime radix: a thread computes a frequency and its mirror image; when all have read, all write.
  template <bool kInverse>
  __device__ __forceinline__ void prime_stage(bool is_rows, const Stage& stage, int count, const float2* roots,
                                              float2* map) const {
    const int radix = stage.radix, outputs = radix / 2 + 1, at_once = items_ / outputs;
    const int which = first_ / outputs, k = first_ - which * outputs;
    const int unit = stage.root_step * stage.count;  // of the roots of the radix
#pragma unroll 1
    for (int begin = 0; begin < count; begin += at_once) {
      const bool is_active = exists_ && which < at_once && begin + which < count;
      Butterfly of_i{};
      float2 low{}, high{};
      if (is_active) {
        of_i = butterfly(is_rows, stage, begin + which, map);
        const int step = of_i.j * stage.root_step;
        const auto read = [&](int q) __attribute__((always_inline)) {
          return kInverse ? multiply<true>(of_i[q], roots[q * step]) : of_i[q];
        };
        float2 even = of_i[0], odd{};
#pragma unroll 1
        for (int q = 1, at = k; q < outputs; ++q, at += at + k < radix ? k : k - radix) {
          const float2 a = read(q), b = read(radix - q), root = roots[at * unit];
          const float sine = kInverse ? -root.y : root.y;
          even.x += root.x * (a.x + b.x), even.y += root.x * (a.y + b.y);
          odd.x += sine * (a.x - b.x), odd.y += sine * (a.y - b.y);
        }
        low = {even.x - odd.y, even.y + odd.x}, high = {even.x + odd.y, even.y - odd.x};
        if (!kInverse && k > 0) {
          low = multiply<false>(low, roots[k * step]), high = multiply<false>(high, roots[(radix - k) * step]);
        }
      }
      __syncthreads();
      if (is_active) {
        of_i[k] = low;
        if (k > 0) of_i[radix - k] = high;
      }
    }
  }
};

}  // namespace vitkernels::cuda
