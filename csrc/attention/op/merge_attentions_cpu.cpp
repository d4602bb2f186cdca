// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on the CPU.
#include <limits>

#include "attention/op/merge_attentions.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

struct OnCpu {
  static constexpr int64_t kMaxParts = std::numeric_limits<int64_t>::max();

  template <class Params>
  static void run(const Checker&, const Params& params, int64_t rows, const Tensor&) {
    constexpr int64_t kRowsPerTask = 256;
    const Kernel<Params>& merge = kernel<Params>();  // throws where VITKERNELS_ISA is none of this CPU's: not in a task
    torch::stable::parallel_for(0, rows, kRowsPerTask,
                                [&](int64_t begin, int64_t end) { merge.run(params, begin, end, nullptr); });
  }
};

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("merge_attentions", &boxed<"merge_attentions", merge_attentions<OnCpu>>);
  m.impl("merge_attentions_backward", &boxed<"merge_attentions_backward", merge_attentions_backward<OnCpu>>);
}
