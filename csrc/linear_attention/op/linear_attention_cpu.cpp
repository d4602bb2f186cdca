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

template <bool kIsPacked>
void linear_attention(Call& call) {
  const LinearArguments args(call, kIsPacked, read_host_integers);
  const LinearProblem& problem = args.problem;
  const Tensor out = args.result(args.query, args.out_sizes());
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

template <bool kIsPacked>
void linear_attention_backward(Call& call) {
  const LinearBackwardArguments args(call, kIsPacked, read_host_integers);
  const LinearProblem& problem = args.problem;
  if (args.is_read()) {
    LinearGradQueryParams params = args.grad_query_params();
    params.splits = linear_splits(problem.batch * problem.kv_heads, problem.num_queries);
    run_with_parts(params, args.query);
    if (args.grad_of_state) add(args.grad_state, *args.grad_of_state);
  }
  if (args.grad_key.numel() > 0) {
    const int64_t tiles = linear_tiles(problem.num_keys);
    const int64_t tasks = problem.batch * problem.kv_heads * tiles;
    run_kernel(kernel<LinearGradKeyParams>(), args.grad_key_params(), tasks, tiles, args.query);
  }
  args.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("linear_attention", &boxed<"linear_attention", linear_attention<false>>);
  m.impl("linear_attention_backward", &boxed<"linear_attention_backward", linear_attention_backward<false>>);
  m.impl("linear_attention_varlen", &boxed<"linear_attention_varlen", linear_attention<true>>);
  m.impl("linear_attention_varlen_backward",
         &boxed<"linear_attention_varlen_backward", linear_attention_backward<true>>);
}
