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

  explicit LinearArguments(Call& call)
      : query(call.take<Tensor>("query")), key(call.take<Tensor>("key")), value(call.take<Tensor>("value")) {
    const Checker& checker = call.checker;
    const auto feature_map = call.take<int64_t>("feature_map"), power = call.take<int64_t>("power");
    problem.normalizes = call.take<bool>("normalize");
    problem.eps = call.take<double>("eps");
    problem.scale = call.take<double>("scale");
    problem.residual = call.take<double>("residual_v");
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
    problem.query = token_tensor(query), problem.key = token_tensor(key), problem.value = token_tensor(value);
  }

  std::vector<int64_t> out_sizes() const {
    return {problem.batch, problem.num_queries, problem.heads, problem.value_dim};
  }
  std::vector<int64_t> state_sizes() const {
    return {problem.batch, problem.kv_heads, problem.head_dim, problem.value_dim + 1};
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

}  // namespace vitkernels
