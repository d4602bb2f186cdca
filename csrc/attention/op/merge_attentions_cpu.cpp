// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on the CPU.
#include "attention/op/merge_attentions.h"
#include "cpu/isa.h"

namespace vitkernels {
namespace {

constexpr int64_t kRowsPerTask = 256;

// `kernel` on all rows, in tasks.
void run(void (*kernel)(const MergeParams&, int64_t, int64_t), const MergeParams& params) {
  torch::stable::parallel_for(0, params.rows, kRowsPerTask,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

std::tuple<Tensor, Tensor> merge_attentions_cpu(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions(outs, lses, kAnyNumber,
                          [](const Checker&, const MergeParams& params) { run(kernels().merge_attentions, params); });
}

std::vector<Tensor> merge_attentions_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse,
                                                  std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions_backward(
      grad_out, grad_lse, outs, lses, kAnyNumber,
      [](const Checker&, const MergeParams& params) { run(kernels().merge_attentions_backward, params); });
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("merge_attentions", TORCH_BOX(&vitkernels::merge_attentions_cpu));
  m.impl("merge_attentions_backward", TORCH_BOX(&vitkernels::merge_attentions_backward_cpu));
}
