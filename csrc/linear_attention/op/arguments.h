// From the tensors of linear attention to the Params of its kernels, with all checks.
#pragma once

#include <cmath>

#include "common/boxed.h"
#include "common/integer_argument.h"
#include "common/token_argument.h"
#include "linear_attention/linear_attention.h"

namespace vitkernels {

// Owns what Params points to. Tensors are (B, N, heads, dim), or (tokens, heads, dim) with a packing.
struct LinearArguments {
  Tensor query, key, value;
  std::optional<Packing> packing;
  OptionalTensor head_map;
  LinearProblem problem;
  bool allow_tf32;
  bool is_trusted;  // the packing and the head map: every token has a sequence, and every head a kv head

  LinearArguments(Call& call, bool is_packed, ReadIntegers read)
      : query(call.take<Tensor>("query")), key(call.take<Tensor>("key")), value(call.take<Tensor>("value")) {
    const Checker& checker = call.checker;
    if (is_packed) {
      packing = {call.take<Tensor>("cu_seqlens_q"), call.take<Tensor>("cu_seqlens_k"),
                 call.take<int64_t>("max_seqlen_q"), call.take<int64_t>("max_seqlen_k")};
    }
    const auto feature_map = call.take<int64_t>("feature_map"), power = call.take<int64_t>("power");
    problem.normalizes = call.take<bool>("normalize");
    problem.eps = call.take<double>("eps");
    problem.scale = call.take<double>("scale");
    problem.residual = call.take<double>("residual_v");
    head_map = call.take<OptionalTensor>("head_map");
    allow_tf32 = call.take<bool>("allow_tf32");
    check_tensors(checker);
    if (packing) check_packing(checker, read);
    read_head_map(checker, head_map, query, problem.heads, problem.kv_heads, read);
    if (head_map) head_map = as_contiguous(*head_map), problem.head_map = integers(*head_map);
    is_trusted = read || (!packing && !head_map);
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
    const int64_t tokens = packing ? 0 : 1;  // the axis
    checker.check(problem.residual == 0.0 || query.size(tokens) == key.size(tokens), "residual_v is ", problem.residual,
                  ", takes 0 where query has ", query.size(tokens), " tokens and key ", key.size(tokens));
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
    std::vector<int64_t> sizes = sizes_of(query);
    sizes.back() = problem.value_dim;
    return sizes;
  }
  std::vector<int64_t> state_sizes() const {
    return {problem.batch, problem.kv_heads, problem.head_dim, problem.value_dim + 1};
  }

  // Zeros where kernels may not write all.
  Tensor result(const Tensor& like, const std::vector<int64_t>& sizes) const {
    return is_trusted ? empty_as(like, sizes, like.scalar_type()) : zeros_as(like, sizes, like.scalar_type());
  }

  // After another tensor has taken the place of one.
  void attach() {
    problem.query = token_tensor(query), problem.key = token_tensor(key), problem.value = token_tensor(value);
  }

 private:
  void check_tensors(const Checker& checker) {
    const int64_t rank = packing ? 3 : 4, tokens = rank - 3;  // the axis of tokens; heads and dim follow
    checker.rank("query", query, rank, packing ? "(tokens, heads, d)" : "(B, Nq, heads, d)");
    checker.rank("key", key, rank, packing ? "(tokens, kv_heads, d)" : "(B, Nk, kv_heads, d)");
    checker.rank("value", value, rank, packing ? "(tokens, kv_heads, dv)" : "(B, Nk, kv_heads, dv)");
    problem.dtype = checker.element_type("query", query);
    for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
      checker.tensor(name, *t, query, query.scalar_type());
    }
    problem.batch = packing ? 0 : query.size(0);
    problem.num_queries = query.size(tokens), problem.num_keys = key.size(tokens);
    problem.heads = query.size(tokens + 1), problem.kv_heads = key.size(tokens + 1);
    problem.head_dim = query.size(tokens + 2), problem.value_dim = value.size(tokens + 2);
    if (!packing) {
      checker.size("key", key, 0, problem.batch, "query's batch size");
      checker.size("value", value, 0, problem.batch, "query's batch size");
    }
    checker.size("value", value, tokens, problem.num_keys, "key's number of tokens");
    checker.size("value", value, tokens + 1, problem.kv_heads, "key's number of heads");
    checker.size("key", key, tokens + 2, problem.head_dim, "query's head dimension");
    checker.check(problem.heads > 0 && problem.heads <= kMaxHeads, "query has ", problem.heads, " heads, takes 1 to ",
                  kMaxHeads);
    checker.check(problem.kv_heads > 0 && problem.kv_heads <= kMaxHeads, "key has ", problem.kv_heads,
                  " heads, takes 1 to ", kMaxHeads);
    checker.check(problem.head_dim > 0, "query has head dimension 0, takes at least 1");
    checker.check(problem.value_dim > 0, "value has head dimension 0, takes at least 1");
  }

  void check_packing(const Checker& checker, ReadIntegers read) {
    check_packing_of(checker, *packing, query);
    packing->cu_seqlens_q = as_contiguous(packing->cu_seqlens_q);
    packing->cu_seqlens_k = as_contiguous(packing->cu_seqlens_k);
    if (read) {
      read_offsets(checker, "cu_seqlens_q", packing->cu_seqlens_q, problem.num_queries, packing->max_seqlen_q, read);
      read_offsets(checker, "cu_seqlens_k", packing->cu_seqlens_k, problem.num_keys, packing->max_seqlen_k, read);
    }
    problem.batch = packing->cu_seqlens_q.size(0) - 1;
    problem.packed_queries = problem.num_queries, problem.packed_keys = problem.num_keys;
    problem.num_queries = std::min(packing->max_seqlen_q, problem.num_queries);
    problem.num_keys = std::min(packing->max_seqlen_k, problem.num_keys);
    problem.cu_seqlens_q = integers(packing->cu_seqlens_q), problem.cu_seqlens_k = integers(packing->cu_seqlens_k);
  }
};

// Those of the backward, and its results.
struct LinearBackwardArguments : LinearArguments {
  OptionalTensor grad_out, grad_of_state;
  Tensor state, grad_query, grad_key, grad_value;
  Tensor grad_state;  // of the state that the queries read, plus the gradient that was given

  LinearBackwardArguments(Call& call, bool is_packed, ReadIntegers read)
      : LinearBackwardArguments(call, call.take<OptionalTensor>("grad_out"), call.take<OptionalTensor>("grad_state"),
                                is_packed, read) {}

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
  LinearBackwardArguments(Call& call, OptionalTensor out, OptionalTensor of_state, bool is_packed, ReadIntegers read)
      : LinearArguments(call, is_packed, read),
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
    const auto gradient_of = [&](const Tensor& t) { return is_trusted ? empty_as(t) : zeros_as(t); };
    grad_query = grad_out ? gradient_of(query) : zeros_as(query);
    grad_key = gradient_of(key), grad_value = gradient_of(value);
    grad_state = is_read() ? empty_as(state) : grad_of_state ? *grad_of_state : zeros_as(state);
  }
};

}  // namespace vitkernels
