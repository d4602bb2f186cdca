// From the tensors of channel attention to the Params of its kernels, with all checks.
#pragma once

#include <cmath>

#include "common/boxed.h"
#include "common/token_argument.h"
#include "linear_attention/channel.h"

namespace vitkernels {

// Owns what the problem points to.
struct ChannelArguments {
  Tensor query, key, value;
  OptionalTensor head_scale;
  ChannelProblem problem;
  bool allow_tf32;

  explicit ChannelArguments(Call& call)
      : query(call.take<Tensor>("query")), key(call.take<Tensor>("key")), value(call.take<Tensor>("value")) {
    problem.scale = call.take<double>("scale");
    head_scale = call.take<OptionalTensor>("head_scale");
    problem.normalizes = call.take<bool>("normalize_channels");
    allow_tf32 = call.take<bool>("allow_tf32");
    check_tensors(call.checker);
    const bool is_finite =
        problem.dtype == DType::kFloat64 ? std::isfinite(problem.scale) : std::isfinite(float(problem.scale));
    call.checker.check(is_finite, "scale is ", problem.scale, ", takes a finite number in ",
                       dtype_text(statistics_type(problem.dtype)));
    if (head_scale) {
      call.checker.tensor("head_scale", *head_scale, query, statistics_type(problem.dtype), {problem.heads});
      head_scale = as_contiguous(*head_scale);
      problem.head_scale = head_scale->const_data_ptr();
    }
    query = with_unit_last_stride(query), key = with_unit_last_stride(key), value = with_unit_last_stride(value);
    attach();
  }

  // After another tensor has taken the place of one.
  void attach() {
    problem.query = token_tensor(query), problem.key = token_tensor(key), problem.value = token_tensor(value);
  }

  // Copies of the operands in another dtype take their place.
  void convert(DType dtype, ScalarType type) {
    for (Tensor* t : {&query, &key, &value}) *t = torch::stable::to(*t, type);
    problem.dtype = dtype;
    attach();
  }

  std::vector<int64_t> out_sizes() const {
    return {problem.batch, problem.num_values, problem.heads, problem.head_dim};
  }
  std::vector<int64_t> state_sizes() const {
    return {problem.batch, problem.heads, problem.head_dim + 1, problem.value_dim + 1};
  }

 private:
  void check_tensors(const Checker& checker) {
    checker.rank("query", query, 4, "(B, N, heads, d)");
    checker.rank("key", key, 4, "(B, N, heads, dv)");
    checker.rank("value", value, 4, "(B, M, heads, dv)");
    problem.dtype = checker.element_type("query", query);
    for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
      checker.tensor(name, *t, query, query.scalar_type());
    }
    problem.batch = query.size(0), problem.num_tokens = query.size(1), problem.num_values = value.size(1);
    problem.heads = query.size(2), problem.head_dim = query.size(3), problem.value_dim = value.size(3);
    for (const auto& [name, t] : {std::pair{"key", &key}, {"value", &value}}) {
      checker.size(name, *t, 0, problem.batch, "query's batch size");
      checker.size(name, *t, 2, problem.heads, "query's number of heads");
    }
    checker.size("key", key, 1, problem.num_tokens, "query's number of tokens");
    checker.size("value", value, 3, key.size(3), "key's head dimension");
    checker.check(problem.heads > 0, "query has 0 heads, takes at least 1");
    checker.check(problem.head_dim > 0, "query has head dimension 0, takes at least 1");
    checker.check(problem.value_dim > 0, "key has head dimension 0, takes at least 1");
  }
};

// Those of the backward, and its results.
struct ChannelBackwardArguments : ChannelArguments {
  Tensor grad_out, state, grad_query, grad_key, grad_value;
  OptionalTensor grad_state;
  bool needs_scale;
  Tensor grad_scale;  // [batch, heads], of the factor on a pair's products

  explicit ChannelBackwardArguments(Call& call)
      : ChannelBackwardArguments(call, call.take<OptionalTensor>("grad_out"), call.take<OptionalTensor>("grad_state")) {
  }

  const void* grad_state_data() const { return grad_state ? grad_state->const_data_ptr() : nullptr; }

  void convert(DType dtype, ScalarType type) {
    ChannelArguments::convert(dtype, type);
    for (Tensor* t : {&grad_out, &grad_query, &grad_key, &grad_value}) *t = torch::stable::to(*t, type);
  }

  void give(Call& call, const Tensor& grad_head_scale) const {
    call.give(grad_query, "grad_query");
    call.give(grad_key, "grad_key");
    call.give(grad_value, "grad_value");
    call.give(grad_head_scale, "grad_head_scale");
  }

 private:
  ChannelBackwardArguments(Call& call, const OptionalTensor& out, OptionalTensor of_state)
      : ChannelArguments(call), state(call.take<Tensor>("state")), grad_state(std::move(of_state)) {
    needs_scale = call.take<bool>("need_head_scale") && head_scale;
    const ScalarType type = query.scalar_type(), statistics = statistics_type(problem.dtype);
    if (out) call.checker.tensor("grad_out", *out, query, type, out_sizes());
    if (grad_state) {
      call.checker.tensor("grad_state", *grad_state, query, statistics, state_sizes());
      grad_state = as_contiguous(*grad_state);
    }
    call.checker.tensor("state", state, query, statistics, state_sizes());
    grad_out = out ? with_unit_last_stride(*out) : zeros_as(query, out_sizes(), type);
    state = as_contiguous(state);
    grad_query = empty_as(query), grad_key = empty_as(key), grad_value = empty_as(value);
    grad_scale = empty_as(query, {problem.batch, problem.heads}, statistics);
  }
};

}  // namespace vitkernels
