// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on the CPU.
#include "attention/op/merge_attentions.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

// The kernel of these params on all rows, in tasks.
template <class Params>
void run_rows(const Params& params, int64_t rows) {
  constexpr int64_t kRowsPerTask = 256;
  const Kernel<Params>& kernel = vitkernels::kernel<Params>();
  torch::stable::parallel_for(0, rows, kRowsPerTask,
                              [&](int64_t begin, int64_t end) { kernel.run(params, begin, end, nullptr); });
}

void merge_attentions(Call& call) {
  merge_attentions(call, kAnyNumber,
                   [](const Checker&, const MergeParams& params, const Tensor&) { run_rows(params, params.rows); });
}

void merge_attentions_backward(Call& call) {
  merge_attentions_backward(call, kAnyNumber, [](const Checker&, const MergeBackwardParams& params, const Tensor&) {
    run_rows(params, params.forward.rows);
  });
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("merge_attentions", &boxed<"merge_attentions", merge_attentions>);
  m.impl("merge_attentions_backward", &boxed<"merge_attentions_backward", merge_attentions_backward>);
}
