// The operators vitkernels::channel_attention and vitkernels::channel_attention_backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "linear_attention/op/channel_arguments.h"
#include "linear_attention/tiles.h"

namespace vitkernels {
namespace {

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
  const ChannelBackwardArguments args(call);
  const ChannelProblem& problem = args.problem;
  ChannelGradParams params{.problem = problem,
                           .state = args.state.const_data_ptr(),
                           .grad_state = args.grad_state_data(),
                           .grad_out = token_tensor(args.grad_out),
                           .grad_query = token_tensor(args.grad_query),
                           .grad_key = token_tensor(args.grad_key),
                           .grad_value = token_tensor(args.grad_value),
                           .grad_scale = args.needs_scale ? args.grad_scale.mutable_data_ptr() : nullptr};
  if (problem.batch > 0) run_stages(params, problem.num_values, problem.num_tokens, args.query);
  if (!args.needs_scale) return args.give(call, none_like(args.query));
  const Tensor grad_head_scale = zeros_as(*args.head_scale);
  sum_over_batch(args.grad_scale, problem.scale, grad_head_scale);
  args.give(call, grad_head_scale);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("channel_attention", &boxed<"channel_attention", channel_attention>);
  m.impl("channel_attention_backward", &boxed<"channel_attention_backward", channel_attention_backward>);
}
