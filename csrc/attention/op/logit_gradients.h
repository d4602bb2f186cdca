// The gradients that reach their tensors through the logits: of query, key, scale and the score terms. Every backward
// operator of this engine returns them.
#pragma once

#include "attention/op/arguments.h"
#include "cpu/kernel.h"

namespace vitkernels {

// Attaches the gradients to `params`, which `args` has filled; the order of the work follows from them.
class LogitGradients {
 public:
  LogitGradients(const AttentionArguments& args, const ScoreFields<bool>& needed, AttentionBackwardParams& params);

  // After the kernel: sums what the tasks left apart.
  void finish(const AttentionArguments& args, const AttentionBackwardParams& params);

  Tensor query, key;
  ScoreFields<OptionalTensor> terms;

 private:
  OffsetGradients offset_gradients;
  OptionalTensor query_parts, relative_query_parts, query_dot;
};

}  // namespace vitkernels
