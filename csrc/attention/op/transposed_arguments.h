// From the tensors of attention_transposed to the Params of its kernels, with all checks.
#pragma once

#include "attention/op/arguments.h"

namespace vitkernels {

// Owns what Params points to. There is a value for each query instead of each key; the arguments of the attention have
// the key in place of the missing value.
class TransposedArguments {
 public:
  TransposedArguments(const Checker& checker, const TransposedCall& call, const DevicePolicy& policy = {})
      : attention(checker, call.attention, policy),
        value(call.value_q),
        lse(call.lse),
        query_weight(call.query_weight) {
    const std::vector<int64_t> rows = attention.lse_sizes();
    const ScalarType statistics = statistics_type(attention.dtype);
    checker.rank("value_q", value, 4, "(B, Nq, heads, dv)");
    checker.tensor("value_q", value, attention.query, attention.query.scalar_type());
    checker.size("value_q", value, 0, rows[0], "query's batch size");
    checker.size("value_q", value, 1, rows[1], "query's number of tokens");
    checker.size("value_q", value, 2, rows[2], "query's number of heads");
    checker.check(value.size(3) > 0, "value_q has head dimension 0, takes at least 1");
    checker.tensor("lse", lse, attention.query, statistics, rows);
    check_score_term(checker, "query_weight", query_weight, attention.query, statistics, rows, "(B, Nq, heads)");
    value = with_unit_last_stride(value);
    lse = as_contiguous(lse);
  }

  void check_grad_out(const Checker& checker, const Tensor& grad_out) const {
    checker.tensor("grad_out", grad_out, attention.query, attention.query.scalar_type(), out_sizes());
  }

  std::vector<int64_t> out_sizes() const {
    return {attention.batch, attention.num_keys, attention.heads, value.size(3)};
  }

  AttentionArguments attention;
  Tensor value, lse;
  OptionalTensor query_weight;
};

// Strides of a tensor broadcast to (batch, query, head).
inline ScoreStrides weight_strides(const Tensor& t, bool contiguous) {
  const ScoreStrides of_axes = score_strides(t, 3, contiguous);
  return {.batch = of_axes.batch, .head = of_axes.key, .query = of_axes.head};
}

}  // namespace vitkernels
