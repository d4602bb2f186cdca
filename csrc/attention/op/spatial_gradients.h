// The gradients of an attention over maps: their tensors, and the partial sums of the tasks.
#pragma once

#include "attention/op/spatial_sums.h"

namespace vitkernels {

class SpatialGradients {
 public:
  // Attaches them to `params`, which `args` has filled; the partition of the work depends on them.
  SpatialGradients(const SpatialArguments& args, const ScoreFields<bool>& needed, SpatialBackwardParams& params);

  // After the kernel: adds the partial sums.
  void finish(const SpatialArguments& args, const SpatialBackwardParams& params);

  Tensor query, key, value;
  ScoreFields<OptionalTensor> terms;

 private:
  OffsetGradients offset_gradients;
  MapPartialSumsOwner key_sums, value_sums, query_sums;
  OptionalTensor key_fill_sums, value_fill_sums, head_scale_sums, key_bias_sums;
};

}  // namespace vitkernels
