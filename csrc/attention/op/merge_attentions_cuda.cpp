// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on a GPU.
#include "attention/op/merge_attentions.h"

#include "attention/cuda/launches.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

struct OnGpu {
  static constexpr int64_t kMaxParts = kMaxMergeParts;

  template <class Params>
  static void run(const Checker& checker, const Params& params, int64_t, const Tensor& part) {
    const OnDevice device(part);
    check_cuda(checker, launch_merge_attentions(params, device.stream()));
  }
};

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("merge_attentions", &boxed<"merge_attentions", merge_attentions<OnGpu>>);
  m.impl("merge_attentions_backward", &boxed<"merge_attentions_backward", merge_attentions_backward<OnGpu>>);
}
