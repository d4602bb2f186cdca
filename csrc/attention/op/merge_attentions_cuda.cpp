// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on a GPU.
#include "attention/cuda/launches.h"
#include "attention/op/merge_attentions.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

void merge_attentions(Call& call) {
  merge_attentions(call, kMaxMergeParts, [](const Checker& checker, const MergeParams& params, const Tensor& part) {
    const OnDevice device(part);
    check_cuda(checker, launch_merge_attentions(params, device.stream()));
  });
}

void merge_attentions_backward(Call& call) {
  merge_attentions_backward(call, kMaxMergeParts,
                            [](const Checker& checker, const MergeBackwardParams& params, const Tensor& part) {
                              const OnDevice device(part);
                              check_cuda(checker, launch_merge_attentions_backward(params, device.stream()));
                            });
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("merge_attentions", &boxed<"merge_attentions", merge_attentions>);
  m.impl("merge_attentions_backward", &boxed<"merge_attentions_backward", merge_attentions_backward>);
}
