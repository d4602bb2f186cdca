// Spectral gating on the CPU. Compiled once per instruction set.
//
// A task is a group of channels, in some batches. It orders the weight once. Then each map goes through its rows,
// through its columns, there and back, and through its rows again: between reading x and writing out, it stays in the
// cache. What a column becomes is multiplied by the weight while it is in registers.

#include "cpu/make_kernel.h"
#include "monarch/cpu/spectral_gating_task.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class SpectralGating {
  using T = Compute<S>;
  using Task = SpectralGatingTask<S>;

 public:
  SpectralGating(const SpectralGatingParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task.begin(i);
      const Range batches = task.batches(i);
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        task.read(params.problem.x, b, data);
        for (int64_t k = 0; k < params.problem.frequencies(); ++k) {
          const MultiplyBy<T, false> gate{task.column(task.weight, k)};
          task.of_columns.forward_and_inverse(task.column(data, k), gate);
        }
        task.write(params.out, b, data);
      }
    }
  }

 private:
  const SpectralGatingParams& params;
  Scratch scratch;
  Task task{params.problem, scratch};
  T* data = scratch.take<T>(task.size());  // [frequencies, rows] of points
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(SpectralGating, SpectralGatingParams);
