// The gradients of a long convolution on the CPU. Compiled once per instruction set.
//
// Both are correlations: that of x with the filter's conjugate spectrum, and that of the filter, of which the spectra
// of all batches are added up before they go back. With several tasks for the same channels, the sums of each are added
// up in the end, in order.

#include "cpu/make_kernel.h"
#include "monarch/cpu/long_conv_task.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LongConvGrad {
  using T = Compute<S>;
  using Task = LongConvTask<S>;
  using Fft = LongConvFft<T>;

 public:
  LongConvGrad(const LongConvGradParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return has_parts() ? p.tasks() * part_size() * int64_t(sizeof(T)) : 0; }

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task.begin(i);
      const Range batches = task.batches(i);
      if (needs_filter) std::fill_n(sum, task.fft.size(), T(0));
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        task.read(params.grad_out, b, grad);
        if (needs_filter) task.read(p.x, b, data);
        for (int64_t r = 0; r < task.fft.rows(); ++r) multiply_row(r);
        task.write(params.grad_x, b, grad);
      }
      if (needs_filter) write_filter(i);
    }
  }

  // Groups [begin, end).
  void finish(int64_t begin, int64_t end) {
    for (task.group = begin; task.group < end; ++task.group) {
      const ChannelSignals<S> to = task.of(params.grad_filter, 0, p.taps);
      for (int64_t tap = 0; tap < p.taps; tap += kN) {
        T tile[Fft::kTile];
        const int64_t count = std::min<int64_t>(p.taps - tap, kN);
        for (int64_t t = 0; t < count; ++t) {
          Vec<T> total{};
          for (int64_t share = 0; share < p.shares; ++share) {
            total += load(part(task.group * p.shares + share) + (tap + t) * kN);
          }
          store(tile + t * kN, total);
        }
        store_tile(to, tap, tile);
      }
    }
  }

 private:
  static constexpr int64_t kN = kWidth<T>;

  void multiply_row(int64_t r) {
    T *row = task.fft.row(grad, r), *other = task.fft.row(data, r), *to = task.fft.row(sum, r);
    const T* by = task.fft.row(task.spectrum, r);
    task.fft.forward_row(row);
    if (needs_filter) {
      task.fft.forward_row(other);
      task.fft.for_each_end([&](int64_t at) VK_BODY {
        Task::transformed(other + at).store(other + at, Fft::kPoint);
        auto points = Task::transformed(row + at);
        points.store(row + at, Fft::kPoint);
        Task::template multiply<true>(points, other + at);
        add(points, to + at);
      });
      task.fft.for_each_end([&](int64_t at) VK_BODY {
        typename Task::End points;
        points.load(row + at, Fft::kPoint);
        go_back(points, row + at, by + at);
      });
    } else {
      task.fft.for_each_end([&](int64_t at) VK_BODY {
        auto points = Task::transformed(row + at);
        go_back(points, row + at, by + at);
      });
    }
    task.fft.inverse_row(row);
  }

  static VK_INLINE void go_back(typename Task::End& points, T* to, const T* by) {
    Task::template multiply<true>(points, by);
    dft<true>(points);
    points.store(to, Fft::kPoint);
  }

  static VK_INLINE void add(const typename Task::End& points, T* to) {
    typename Task::End total;
    total.load(to, Fft::kPoint);
#pragma GCC unroll 8
    for (int k = 0; k < Fft::kEnds; ++k) total.re[k] += points.re[k], total.im[k] += points.im[k];
    total.store(to, Fft::kPoint);
  }

  void write_filter(int64_t i) {
    const T scale = T(1) / T(p.plan->length);
    for (int64_t r = 0; r < task.fft.rows(); ++r) {
      T* row = task.fft.row(sum, r);
      task.fft.for_each_end([&](int64_t at) VK_BODY {
        typename Task::End points;
        points.load(row + at, Fft::kPoint);
        for (int k = 0; k < Fft::kEnds; ++k) points.re[k] *= scale, points.im[k] *= scale;
        dft<true>(points);
        points.store(row + at, Fft::kPoint);
      });
      task.fft.inverse_row(row);
    }
    if (has_parts()) {
      task.write_taps(ChannelSignals<T>{part(i), 1, kN, kN, p.taps}, sum);
    } else {
      task.write_taps(task.of(params.grad_filter, 0, p.taps), sum);
    }
  }

  bool has_parts() const { return needs_filter && p.shares > 1; }
  int64_t part_size() const { return p.taps * kN; }
  T* part(int64_t i) const { return static_cast<T*>(params.partial) + i * part_size(); }

  const LongConvGradParams& params;
  const LongConvProblem& p = params.problem;
  const bool needs_filter = params.grad_filter.data;
  Scratch scratch;
  Task task{p, scratch};
  T* grad = scratch.take<T>(task.fft.size());                     // [rows, columns] of points
  T* data = scratch.take<T>(needs_filter ? task.fft.size() : 0);  // that of x
  T* sum = scratch.take<T>(needs_filter ? task.fft.size() : 0);   // the spectrum of the filter's gradient
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LongConvGrad, LongConvGradParams);
