// The gradients that flow through the logits, on the CPU: of query, key, scale and the score terms. The backward
// operators of attention and attention_transposed share them.
#pragma once

#include "attention/op/arguments.h"
#include "cpu/kernel.h"

namespace vitkernels {

// Attaches the gradients to `params`, which `args` has filled; the partition of the work depends on them. Kernels that
// have all keys of their queries at once store the query gradient themselves if they say that they can.
class LogitGradients {
 public:
  LogitGradients(const AttentionArguments& args, const ScoreFields<bool>& needed, AttentionBackwardParams& params,
                 bool stores_query_gradient);

  // After the kernel: adds the partial sums.
  void finish(const AttentionArguments& args, const AttentionBackwardParams& params);

  Tensor query, key;
  ScoreFields<OptionalTensor> terms;

 private:
  OffsetGradients offset_gradients;
  OptionalTensor query_parts, relative_query_parts, query_dot;
};

}  // namespace vitkernels
