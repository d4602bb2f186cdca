// The operators vitkernels::linear_attention and vitkernels::linear_attention_backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "linear_attention/op/arguments.h"
#include "linear_attention/tiles.h"

namespace vitkernels {
namespace {

// Runs a kernel that leaves partial sums of the state, and adds them up.
template <class Params>
void run_with_parts(Params& params, const Tensor& like) {
  const Kernel<Params>& kernel = vitkernels::kernel<Params>();
  const ScalarType type = statistics_type(params.problem.dtype);
  const int64_t bytes = kernel.parts(params), element = type == ScalarType::Double ? 8 : 4;
  const Tensor parts = empty_as(like, {bytes / element}, type);
  params.parts = parts.mutable_data_ptr();
  run_kernel(kernel, params, params.num_tasks(), 1, like);
  torch::stable::parallel_for(0, params.problem.batch * params.problem.kv_heads, 1,
                              [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
}

void linear_attention(Call& call) {
  const LinearArguments args(call);
  const LinearProblem& problem = args.problem;
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor state = empty_as(args.query, args.state_sizes(), statistics_type(problem.dtype));
  if (problem.batch > 0) {
    LinearStateParams sums{.problem = problem, .state = state.mutable_data_ptr()};
    sums.splits = linear_splits(problem.batch * problem.kv_heads, problem.num_keys);
    run_with_parts(sums, args.query);
  }
  if (out.numel() > 0) {
    const int64_t tiles = linear_tiles(problem.num_queries);
    const LinearOutputParams params{.problem = problem, .state = state.const_data_ptr(), .out = token_tensor(out)};
    run_kernel(kernel<LinearOutputParams>(), params, problem.batch * problem.heads * tiles, tiles, args.query);
  }
  call.give(out, "out");
  call.give(state, "state");
}

void add(const Tensor& sum, const Tensor& other) {
  dispatch_statistics(sum, [&]<class T>(T) {
    T* const to = static_cast<T*>(sum.mutable_data_ptr());
    const T* const from = static_cast<const T*>(other.const_data_ptr());
    for (int64_t i = 0; i < sum.numel(); ++i) to[i] += from[i];
  });
}

// The gradients of the queries and of the state, by what the queries read.
void differentiate_queries(const LinearArguments& args, const Tensor& state, const Tensor& grad_out,
                           const Tensor& grad_query, const Tensor& grad_state) {
  const LinearProblem& problem = args.problem;
  LinearGradQueryParams params{.problem = problem,
                               .state = state.const_data_ptr(),
                               .grad_out = token_tensor(grad_out),
                               .grad_query = token_tensor(grad_query),
                               .grad_state = grad_state.mutable_data_ptr()};
  params.splits = linear_splits(problem.batch * problem.kv_heads, problem.num_queries);
  run_with_parts(params, args.query);
}

void linear_attention_backward(Call& call) {
  OptionalTensor grad_out = call.take<OptionalTensor>("grad_out");
  const OptionalTensor grad_of_state = call.take<OptionalTensor>("grad_state");
  LinearArguments args(call);
  const Tensor state = call.take<Tensor>("state");
  LinearProblem& problem = args.problem;
  const ScalarType type = args.query.scalar_type(), statistics = statistics_type(problem.dtype);
  const auto check = [&](const char* name, const Tensor& t, ScalarType expected, const std::vector<int64_t>& sizes) {
    call.checker.tensor(name, t, args.query, expected, sizes);
  };
  if (grad_out) check("grad_out", *grad_out, type, args.out_sizes());
  if (grad_of_state) check("grad_state", *grad_of_state, statistics, args.state_sizes());
  check("state", state, statistics, args.state_sizes());
  if (grad_out) grad_out = with_unit_last_stride(*grad_out);
  const bool is_read = grad_out && problem.batch > 0;
  const Tensor grad_query = grad_out ? empty_as(args.query) : zeros_as(args.query);
  const Tensor grad_state =
      is_read ? empty_as(state, args.state_sizes(), statistics) : zeros_as(state, args.state_sizes(), statistics);
  const Tensor grad_key = empty_as(args.key), grad_value = empty_as(args.value);
  if (is_read) differentiate_queries(args, as_contiguous(state), *grad_out, grad_query, grad_state);
  if (grad_of_state) add(grad_state, as_contiguous(*grad_of_state));
  if (grad_key.numel() > 0) {
    if (!grad_out) problem.residual = 0.0;  // of an output without a gradient
    const int64_t tiles = linear_tiles(problem.num_keys);
    const LinearGradKeyParams params{.problem = problem,
                                     .grad_state = grad_state.const_data_ptr(),
                                     .grad_out = grad_out ? token_tensor(*grad_out) : TokenTensor{},
                                     .grad_key = token_tensor(grad_key),
                                     .grad_value = token_tensor(grad_value)};
    run_kernel(kernel<LinearGradKeyParams>(), params, problem.batch * problem.kv_heads * tiles, tiles, args.query);
  }
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("linear_attention", &boxed<"linear_attention", linear_attention>);
  m.impl("linear_attention_backward", &boxed<"linear_attention_backward", linear_attention_backward>);
}
