// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on the CPU.
#include "attention/op/merge_attentions.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

constexpr int64_t kRowsPerTask = 256;

// Runs the kernel of these params on all rows, in tasks.
template <class Params>
void run(const Params& params, int64_t rows) {
  const Kernel<Params>& kernel = vitkernels::kernel<Params>();
  torch::stable::parallel_for(0, rows, kRowsPerTask,
                              [&](int64_t begin, int64_t end) { kernel.run(params, begin, end, nullptr); });
}

std::tuple<Tensor, Tensor> merge_attentions_cpu(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions(outs, lses, kAnyNumber,
                          [](const Checker&, const MergeParams& params) { run(params, params.rows); });
}

std::vector<Tensor> merge_attentions_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse,
                                                  std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions_backward(
      grad_out, grad_lse, outs, lses, kAnyNumber,
      [](const Checker&, const MergeBackwardParams& params) { run(params, params.forward.rows); });
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("merge_attentions", TORCH_BOX(&vitkernels::merge_attentions_cpu));
  m.impl("merge_attentions_backward", TORCH_BOX(&vitkernels::merge_attentions_backward_cpu));
}
