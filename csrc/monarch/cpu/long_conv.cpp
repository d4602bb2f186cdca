// A long convolution on the CPU. Compiled once per instruction set.
//
// A task is a group of channels, in some batches. It transforms the filter once. Then each batch's signals go through
// columns and rows of the transform; what a row becomes is multiplied by the filter's while it is in registers, and
// goes back at once.

#include "cpu/make_kernel.h"
#include "monarch/cpu/long_conv_task.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LongConv {
  using T = Compute<S>;
  using Task = LongConvTask<S>;
  using Fft = LongConvFft<T>;

 public:
  LongConv(const LongConvParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task.begin(i);
      const Range batches = task.batches(i);
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        task.read(params.problem.x, b, data);
        for (int64_t r = 0; r < task.fft.rows(); ++r) multiply_row(r);
        task.write(params.out, b, data);
      }
    }
  }

 private:
  void multiply_row(int64_t r) {
    T* row = task.fft.row(data, r);
    const T* by = task.fft.row(task.spectrum, r);
    task.fft.forward_row(row);
    task.fft.for_each_end([&](int64_t at) VK_BODY {
      auto points = Task::transformed(row + at);
      Task::template multiply<false>(points, by + at);
      dft<true>(points);
      points.store(row + at, Fft::kPoint);
    });
    task.fft.inverse_row(row);
  }

  const LongConvParams& params;
  Scratch scratch;
  Task task{params.problem, scratch};
  T* data = scratch.take<T>(task.fft.size());  // [rows, columns] of points
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LongConv, LongConvParams);
