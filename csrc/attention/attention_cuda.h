// The attention engine's kernels on a GPU, as host functions that launch them.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.h"

namespace vitkernels {

// Each part costs four pointers of a kernel's arguments, which are limited to 4 KB.
inline constexpr int64_t kMaxMergeParts = 64;

cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions_backward(const MergeParams& params, cudaStream_t stream);

}  // namespace vitkernels
