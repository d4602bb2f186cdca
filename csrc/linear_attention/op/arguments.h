// From the tensors of linear attention to the Params of its kernels, with all checks.
#pragma once

#include <cmath>

#include "common/boxed.h"
#include "common/token_argument.h"
#include "linear_attention/linear_attention.h"

namespace vitkernels {

// Owns what Params points to.
struct LinearArguments {
  Tensor query, key, value;
  LinearProblem problem;
  bool allow_tf32;

  explicit LinearArguments(Call& call)
      : query(call.take<Tensor>("query")), key(call.take<Tensor>("key")), value(call.take<Tensor>("value")) {
    const Checker& checker = call.checker;
    const auto feature_map = call.take<int64_t>("feature_map"), power = call.take<int64_t>("power");
    problem.normalizes = call.take<bool>("normalize");
    problem.eps = call.take<double>("eps");
    problem.scale = call.take<double>("scale");
    problem.residual = call.take<double>("residual_v");
    allow_tf32 = call.take<bool>("allow_tf32");
    check_tensors(checker);
    checker.check(feature_map >= 0 && feature_map < kNumFeatureMaps, "feature_map is ", feature_map, ", takes 0 to ",
                  kNumFeatureMaps - 1);
    checker.check(power >= 1 && power <= kMaxFocusPower, "power is ", power, ", takes 1 to ", kMaxFocusPower);
    for (const auto& [name, x] :
         {std::pair{"eps", problem.eps}, {"scale", problem.scale}, {"residual_v", problem.residual}}) {
      const bool is_finite = problem.dtype == DType::kFloat64 ? std::isfinite(x) : std::isfinite(float(x));
      checker.check(is_finite, name, " is ", x, ", takes a finite number in ",
                    dtype_text(statistics_type(problem.dtype)));
    }
    checker.check(problem.eps >= 0.0, "eps is ", problem.eps, ", takes a number that is not negative");
    checker.check(problem.residual == 0.0 || problem.num_queries == problem.num_keys, "residual_v is ",
                  problem.residual, ", takes 0 where query has ", problem.num_queries, " tokens and key ",
                  problem.num_keys);
    problem.feature_map = FeatureMap(feature_map), problem.power = power;
    query = with_unit_last_stride(query), key = with_unit_last_stride(key), value = with_unit_last_stride(value);
    attach();
  }

  // Copies of the operands in another dtype take their place.
  void convert(DType dtype, ScalarType type) {
    for (Tensor* t : {&query, &key, &value}) *t = torch::stable::to(*t, type);
    problem.dtype = dtype;
    attach();
  }

  std::vector<int64_t> out_sizes() const {
    return {problem.batch, problem.num_queries, problem.heads, problem.value_dim};
  }
  std::vector<int64_t> state_sizes() const {
    return {problem.batch, problem.kv_heads, problem.head_dim, problem.value_dim + 1};
  }

  // After another tensor has taken the place of one.
  void attach() {
    problem.query = token_tensor(query), problem.key = token_tensor(key), problem.value = token_tensor(value);
  }

 private:
  void check_tensors(const Checker& checker) {
    checker.rank("query", query, 4, "(B, Nq, heads, d)");
    checker.rank("key", key, 4, "(B, Nk, kv_heads, d)");
    checker.rank("value", value, 4, "(B, Nk, kv_heads, dv)");
    problem.dtype = checker.element_type("query", query);
    for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
      checker.tensor(name, *t, query, query.scalar_type());
    }
    problem.batch = query.size(0), problem.num_queries = query.size(1), problem.num_keys = key.size(1);
    problem.heads = query.size(2), problem.kv_heads = key.size(2);
    problem.head_dim = query.size(3), problem.value_dim = value.size(3);
    checker.size("key", key, 0, problem.batch, "query's batch size");
    checker.size("value", value, 0, problem.batch, "query's batch size");
    checker.size("value", value, 1, problem.num_keys, "key's number of tokens");
    checker.size("value", value, 2, problem.kv_heads, "key's number of heads");
    checker.size("key", key, 3, problem.head_dim, "query's head dimension");
    checker.check(problem.heads > 0, "query has 0 heads, takes at least 1");
    checker.check(problem.kv_heads > 0 && problem.heads % problem.kv_heads == 0, "key has ", problem.kv_heads,
                  " heads, takes a divisor of query's ", problem.heads);
    checker.check(problem.head_dim > 0, "query has head dimension 0, takes at least 1");
    checker.check(problem.value_dim > 0, "value has head dimension 0, takes at least 1");
  }
};

// Those of the backward, and its results.
struct LinearBackwardArguments : LinearArguments {
  OptionalTensor grad_out, grad_of_state;
  Tensor state, grad_query, grad_key, grad_value;
  Tensor grad_state;  // of the state that the queries read, plus the gradient that was given

  explicit LinearBackwardArguments(Call& call)
      : LinearBackwardArguments(call, call.take<OptionalTensor>("grad_out"), call.take<OptionalTensor>("grad_state")) {}

  // Whether queries have read the state.
  bool is_read() const { return grad_out && problem.batch > 0; }

  LinearGradQueryParams grad_query_params() const {
    return {.problem = problem,
            .state = state.const_data_ptr(),
            .grad_out = token_tensor(*grad_out),
            .grad_query = token_tensor(grad_query),
            .grad_state = grad_state.mutable_data_ptr()};
  }
  LinearGradKeyParams grad_key_params() const {
    LinearGradKeyParams params{.problem = problem,
                               .grad_state = grad_state.const_data_ptr(),
                               .grad_out = grad_out ? token_tensor(*grad_out) : TokenTensor{},
                               .grad_key = token_tensor(grad_key),
                               .grad_value = token_tensor(grad_value)};
    if (!grad_out) params.problem.residual = 0.0;  // of an output without a gradient
    return params;
  }

  void convert(DType dtype, ScalarType type) {
    LinearArguments::convert(dtype, type);
    if (grad_out) grad_out = torch::stable::to(*grad_out, type);
    for (Tensor* t : {&grad_query, &grad_key, &grad_value}) *t = torch::stable::to(*t, type);
  }

  void give(Call& call) const {
    call.give(grad_query, "grad_query");
    call.give(grad_key, "grad_key");
    call.give(grad_value, "grad_value");
  }

 private:
  LinearBackwardArguments(Call& call, OptionalTensor out, OptionalTensor of_state)
      : LinearArguments(call),
        grad_out(std::move(out)),
        grad_of_state(std::move(of_state)),
        state(call.take<Tensor>("state")) {
    const ScalarType statistics = statistics_type(problem.dtype);
    const auto check = [&](const char* name, const Tensor& t, ScalarType type, const std::vector<int64_t>& sizes) {
      call.checker.tensor(name, t, query, type, sizes);
    };
    if (grad_out) check("grad_out", *grad_out, query.scalar_type(), out_sizes());
    if (grad_of_state) check("grad_state", *grad_of_state, statistics, state_sizes());
    check("state", state, statistics, state_sizes());
    if (grad_out) grad_out = with_unit_last_stride(*grad_out);
    if (grad_of_state) grad_of_state = as_contiguous(*grad_of_state);
    state = as_contiguous(state);
    grad_query = grad_out ? empty_as(query) : zeros_as(query);
    grad_key = empty_as(key), grad_value = empty_as(value);
    grad_state = is_read() ? empty_as(state) : grad_of_state ? *grad_of_state : zeros_as(state);
  }
};

}  // namespace vitkernels
