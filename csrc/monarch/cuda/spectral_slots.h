// Where the points of a thread block's maps lie in shared memory, and which of them a thread has.
//
// A line holds the points of two rows, and after their transform the frequencies of both. Channels are neighbours, so
// that of sixteen the threads use all banks, whatever the stride of a stage.
#pragma once

#include "monarch/cuda/spectral_lines.h"

namespace vitkernels::cuda {

// A thread has one channel, and shares the butterflies of all lines with the others of that channel.
class SpectralSlots {
 public:
  using Stage = RadixStages::Stage;

  const SpectralGatingCudaParams& p;
  const int64_t channel;

  __device__ SpectralSlots(const SpectralGatingCudaParams& p, int64_t group, float2* shared)
      : p(p),
        channel((group << p.log_group) + lane()),
        exists_(channel < p.channels),
        first_(int(threadIdx.x) >> p.log_group),
        items_(int(blockDim.x) >> p.log_group),
        column_roots_(shared),
        row_roots_(column_roots_ + p.rows),
        slots_(reinterpret_cast<int*>(row_roots_ + p.columns)),
        frequency_(slots_ + 2 * p.frequencies()) {
    for (int k = int(threadIdx.x); k < p.rows; k += int(blockDim.x)) {
      if (p.of_columns.stages > 1) column_roots_[k] = root_of_unity(k, p.rows);
      frequency_[p.of_columns.place(k)] = k;
    }
    for (int k = int(threadIdx.x); k < p.columns; k += int(blockDim.x)) {
      if (p.of_rows.stages > 1) row_roots_[k] = root_of_unity(k, p.columns);
      if (k >= p.frequencies()) continue;
      slots_[k] = slot(p.of_rows.place(k)) << p.log_group;
      slots_[p.frequencies() + k] = slot(p.of_rows.place(k > 0 ? p.columns - k : 0)) << p.log_group;
    }
    __syncthreads();
  }

  // This thread's channel in a thread block's memory, where channels are neighbours.
  template <class T>
  __device__ T* own(T* memory) const {
    return memory + lane();
  }

  // The frequency that a column's transform leaves at a place.
  __device__ int frequency(int place) const { return frequency_[place]; }

  // Calls f(i) for this thread's share of `count` items.
  template <class Function>
  __device__ __forceinline__ void for_each(int count, Function&& f) const {
    if (!exists_) return;
    for (int i = first_; i < count; i += items_) f(i);
  }

 protected:
  struct Both {
    float2 first, second;
  };

  // For real a and b, the spectrum of a + i b has those of a, as symmetric as a real signal's, and of i b. From two
  // mirrored frequencies to one of both rows, and back.
  static __device__ __forceinline__ Both rows_of(float2 low, float2 high) {
    return {{low.x + high.x, low.y - high.y}, {low.y + high.y, high.x - low.x}};
  }
  // Two frequencies of a real signal are real: their imaginary parts are ignored, as torch.fft does.
  static __device__ __forceinline__ Both line_of(float2 even, float2 odd, bool is_real) {
    if (is_real) even.y = 0.0f, odd.y = 0.0f;
    return {{even.x - odd.y, even.y + odd.x}, {even.x + odd.y, odd.x - even.y}};
  }

  // A line's padding keeps neighbours in different banks, where a group has less than sixteen channels.
  __device__ __forceinline__ int slot(int point) const { return point + p.by_padding.divide(point); }
  __device__ __forceinline__ int slot_at(int pair, int w) const { return (pair * p.line + slot(w)) << p.log_group; }

  __device__ __forceinline__ Butterfly row_butterfly(const Stage& stage, int i, float2* map) const {
    const int pair = stage.by_butterflies.divide(i), b = i - pair * stage.butterflies;
    const int span = stage.by_count.divide(b), j = b - span * stage.count;
    float2* const first = map + slot_at(pair, span * stage.count * stage.radix + j);
    const int step = stage.slot_step << p.log_group;
    return {first, first + step, 2 * step, j};
  }
  // Points h, h + count, ... of a column.
  __device__ __forceinline__ Butterfly column_butterfly(int h, int count, int j, int k, float2* map) const {
    const int line = p.line << p.log_group;
    const int even = slots_[k], mirrored = slots_[p.frequencies() + k], odd = mirrored != even ? mirrored : end_slot(k);
    const auto at = [&](int h) __attribute__((always_inline)) { return map + h / 2 * line + (h % 2 ? odd : even); };
    return {at(h), at(h + count), count * line, j};
  }
  __device__ __forceinline__ Butterfly butterfly(bool is_rows, const Stage& stage, int i, float2* map) const {
    if (is_rows) return row_butterfly(stage, i, map);
    const int b = p.by_frequencies.divide(i), k = i - b * p.frequencies();
    const int span = stage.by_count.divide(b), j = b - span * stage.count;
    return column_butterfly(span * stage.count * stage.radix + j, stage.count, j, k, map);
  }

  // At the end of a line: the odd row's frequencies 0 and columns / 2, which are their own mirror images.
  __device__ __forceinline__ int end_slot(int k) const { return (slot(p.columns - 1) + 1 + (k > 0)) << p.log_group; }

  // Calls f(low, high, odd) for mirrored frequencies, which one frequency of the even row has the first slot of.
  template <class Function>
  __device__ __forceinline__ void for_each_pair_of_slots(float2* map, Function&& f) const {
    for_each(p.pairs() * p.frequencies(), [&](int i) __attribute__((always_inline)) {
      const int pair = p.by_frequencies.divide(i), k = i - pair * p.frequencies();
      const int low = slots_[k], high = slots_[p.frequencies() + k];
      float2* const line = map + (pair * p.line << p.log_group);
      f(line + low, line + high, line + (high != low ? high : end_slot(k)));
    });
    __syncthreads();
  }

  __device__ __forceinline__ const float2* roots(bool is_rows) const { return is_rows ? row_roots_ : column_roots_; }
  __device__ __forceinline__ int low_slot(int k) const { return slots_[k]; }
  __device__ __forceinline__ int high_slot(int k) const { return slots_[p.frequencies() + k]; }  // its mirror image's

  const bool exists_;
  const int first_, items_;  // of the items of a channel: this thread's first one, and how many threads share them

 private:
  __device__ int lane() const { return int(threadIdx.x) & ((1 << p.log_group) - 1); }

  float2 *const column_roots_, *const row_roots_;  // [rows], [columns]
  int* const slots_;                               // [2, frequencies], of a frequency and its mirror image
  int* const frequency_;                           // [rows], by place
};

}  // namespace vitkernels::cuda
