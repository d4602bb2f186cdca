// The gradients that reach their tensors through the logits: of query, key, scale and the score terms. Every backward
// operator of this engine returns them.
#pragma once

#include "attention/op/backward_arguments.h"
#include "cpu/kernel.h"

namespace vitkernels {

// Attaches the gradients to `params`, which `args` has filled; the order of the work follows from them. What is not
// needed is empty.
class LogitGradients {
 public:
  LogitGradients(const AttentionArguments& args, NeededGradients needed, AttentionBackwardParams& params);

  // After the kernel: sums what the tasks left apart.
  void finish(const AttentionArguments& args, const AttentionBackwardParams& params);

  Tensor query, key, head_scale, bias, key_bias, multiplier;
  std::vector<Tensor> on_grid;  // in the order of the arguments

 private:
  GridGradients grid_gradients;
  Tensor query_parts, relative_query_parts, query_dot;
  bool needs_head_scale;
};

}  // namespace vitkernels
