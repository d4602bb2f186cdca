// The operators vitkernels::channel_attention and vitkernels::channel_attention_backward on the CPU.
#include <cmath>

#include "common/boxed.h"
#include "common/parallel.h"
#include "common/token_argument.h"
#include "cpu/kernel.h"
#include "linear_attention/channel.h"
#include "linear_attention/tiles.h"

namespace vitkernels {
namespace {

// Owns what the problem points to.
struct ChannelArguments {
  Tensor query, key, value;
  OptionalTensor head_scale;
  ChannelProblem problem;

  explicit ChannelArguments(Call& call)
      : query(call.take<Tensor>("query")), key(call.take<Tensor>("key")), value(call.take<Tensor>("value")) {
    problem.scale = call.take<double>("scale");
    head_scale = call.take<OptionalTensor>("head_scale");
    problem.normalizes = call.take<bool>("normalize_channels");
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
    problem.query = token_tensor(query), problem.key = token_tensor(key), problem.value = token_tensor(value);
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

// Of few pairs, the tokens are divided: a first pass over the tokens that are summed, a second over those that read.
template <class Params>
void run_stages(Params& params, int64_t num_summed, int64_t num_read, const Tensor& like) {
  ChannelProblem& problem = params.problem;
  const Kernel<Params>& kernel = vitkernels::kernel<Params>();
  const int64_t pairs = problem.num_pairs(), tiles = linear_tiles(num_read);
  problem.splits = linear_splits(pairs, num_summed);
  if (problem.splits == 1 || num_read == 0) return run_kernel(kernel, params, pairs, 1, like);
  problem.stage = ChannelStage::kSum;
  const int64_t element = problem.dtype == DType::kFloat64 ? 8 : 4;
  const Tensor parts = empty_as(like, {kernel.parts(params) / element}, statistics_type(problem.dtype));
  problem.parts = parts.mutable_data_ptr();
  run_kernel(kernel, params, pairs * problem.splits, 1, like);
  problem.stage = ChannelStage::kRead;
  run_kernel(kernel, params, pairs * tiles, tiles, like);
}

void channel_attention(Call& call) {
  const ChannelArguments args(call);
  const ChannelProblem& problem = args.problem;
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor state = empty_as(args.query, args.state_sizes(), statistics_type(problem.dtype));
  ChannelParams params{.problem = problem, .state = state.mutable_data_ptr(), .out = token_tensor(out)};
  if (problem.batch > 0) run_stages(params, problem.num_tokens, problem.num_values, args.query);
  call.give(out, "out");
  call.give(state, "state");
}

// The sums over the batch, of factors that were multiplied with `scale`.
void sum_over_batch(const Tensor& of_pairs, double scale, const Tensor& sums) {
  dispatch_statistics(sums, [&]<class T>(T) {
    const T* from = static_cast<const T*>(of_pairs.const_data_ptr());
    T* const to = static_cast<T*>(sums.mutable_data_ptr());
    for (int64_t pair = 0; pair < of_pairs.numel(); ++pair) to[pair % sums.numel()] += from[pair] * T(scale);
  });
}

void channel_attention_backward(Call& call) {
  const OptionalTensor given_out = call.take<OptionalTensor>("grad_out");
  OptionalTensor grad_state = call.take<OptionalTensor>("grad_state");
  const ChannelArguments args(call);
  const Tensor given_state = call.take<Tensor>("state");
  const bool needs_scale = call.take<bool>("need_head_scale") && args.head_scale;
  const ChannelProblem& problem = args.problem;
  const ScalarType statistics = statistics_type(problem.dtype);
  const ScalarType type = args.query.scalar_type();
  if (given_out) call.checker.tensor("grad_out", *given_out, args.query, type, args.out_sizes());
  if (grad_state) {
    call.checker.tensor("grad_state", *grad_state, args.query, statistics, args.state_sizes());
    grad_state = as_contiguous(*grad_state);
  }
  call.checker.tensor("state", given_state, args.query, statistics, args.state_sizes());
  const Tensor grad_out = given_out ? with_unit_last_stride(*given_out) : zeros_as(args.query, args.out_sizes(), type);
  const Tensor state = as_contiguous(given_state);
  const Tensor grad_query = empty_as(args.query), grad_key = empty_as(args.key), grad_value = empty_as(args.value);
  const Tensor of_pairs = empty_as(args.query, {problem.batch, problem.heads}, statistics);
  ChannelGradParams params{.problem = problem,
                           .state = state.const_data_ptr(),
                           .grad_state = grad_state ? grad_state->const_data_ptr() : nullptr,
                           .grad_out = token_tensor(grad_out),
                           .grad_query = token_tensor(grad_query),
                           .grad_key = token_tensor(grad_key),
                           .grad_value = token_tensor(grad_value),
                           .grad_scale = needs_scale ? of_pairs.mutable_data_ptr() : nullptr};
  if (problem.batch > 0) run_stages(params, problem.num_values, problem.num_tokens, args.query);
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value");
  if (!needs_scale) return call.give(none_like(args.query), "grad_head_scale");
  const Tensor grad_head_scale = zeros_as(*args.head_scale);
  sum_over_batch(of_pairs, problem.scale, grad_head_scale);
  call.give(grad_head_scale, "grad_head_scale");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("channel_attention", &boxed<"channel_attention", channel_attention>);
  m.impl("channel_attention_backward", &boxed<"channel_attention_backward", channel_attention_backward>);
}
