// The backward over maps with any pattern on a GPU: memory for gradients and partial sums, and launches.
#pragma once

#include "attention/op/spatial_params_cuda.h"

namespace vitkernels {

struct SpatialGradientTensors {
  Tensor query, key, value;  // zero where there are no queries
  ScoreFields<OptionalTensor> terms;
};

// Fills `grads`, whose data are allocated and whose terms are those that are wanted.
void launch_spatial_backward(const Checker& checker, const SpatialArguments& args, const BackwardCall& from,
                             bool allow_tf32, const SpatialGradientTensors& grads);

}  // namespace vitkernels
