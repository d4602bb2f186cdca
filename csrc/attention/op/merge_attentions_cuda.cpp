// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on a GPU.
#include "attention/cuda/launches.h"
#include "attention/op/merge_attentions.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

std::tuple<Tensor, Tensor> merge_attentions_cuda(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions(outs, lses, kMaxMergeParts, [&](const Checker& checker, const MergeParams& params) {
    const OnDevice device(outs[0]);
    check_cuda(checker, launch_merge_attentions(params, device.stream()));
  });
}

std::vector<Tensor> merge_attentions_backward_cuda(const Tensor& grad_out, OptionalTensor grad_lse,
                                                   std::vector<Tensor> outs, std::vector<Tensor> lses) {
  return merge_attentions_backward(grad_out, grad_lse, outs, lses, kMaxMergeParts,
                                   [&](const Checker& checker, const MergeBackwardParams& params) {
                                     const OnDevice device(outs[0]);
                                     check_cuda(checker, launch_merge_attentions_backward(params, device.stream()));
                                   });
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("merge_attentions", TORCH_BOX(&vitkernels::merge_attentions_cuda));
  m.impl("merge_attentions_backward", TORCH_BOX(&vitkernels::merge_attentions_backward_cuda));
}
