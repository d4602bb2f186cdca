// The operators vitkernels::channel_attention and vitkernels::channel_attention_backward on a GPU.
#include "linear_attention/cuda/channel_launches.h"
#include "linear_attention/op/channel_arguments.h"
#include "linear_attention/op/on_device.h"

namespace vitkernels {
namespace {

// float16 holds no sums over many tokens; TF32 has its bits, and float's range.
template <class Arguments>
void prepare(const Checker& checker, Arguments& args, std::initializer_list<Tensor*> tensors) {
  const ChannelProblem& p = args.problem;
  check_on_device(checker, p.dtype, "query or key", std::max(p.head_dim, p.value_dim));
  for (Tensor* t : tensors) *t = with_near_tokens(*t);
  args.attach();
  if (p.dtype != DType::kFloat16) return;
  args.convert(DType::kFloat32, ScalarType::Float);
  args.allow_tf32 = true;
}

// One call's kernels.
class ChannelsOnDevice {
 public:
  ChannelsOnDevice(const Checker& checker, const ChannelArguments& args)
      : checker_(checker), args_(args), device_(args.query) {}

  // `launch(dtype)` is a function of the launches of a dtype's kernels.
  template <class Params, class Launch>
  void run(const Params& params, Launch&& launch) const {
    const auto run = [&](auto function) { return function(params, args_.allow_tf32, device_.stream()); };
    check_cuda(checker_, args_.problem.dtype == DType::kFloat32 ? run(launch(Of<DType::kFloat32>{}))
                                                                : run(launch(Of<DType::kBFloat16>{})));
  }
  // One of the small kernels.
  template <class Launch, class... Params>
  void run_small(Launch&& launch, const Params&... params) const {
    check_cuda(checker_, launch(params..., device_.stream()));
  }

  // Runs a kernel that leaves parts of a state; returns their sum.
  template <class Params, class Launch>
  Tensor sum(Params& params, LinearPart part, int64_t tokens, Launch&& launch) const {
    const ChannelProblem& p = args_.problem;
    const int64_t splits = params.splits = linear_blocks_of_pair(p.num_pairs(), tokens);
    const Tensor parts = matrices(splits * part.size());
    const Tensor sums = matrices(part.head_dim * (part.value_dim + 1));
    params.parts = floats(parts);
    run(params, launch);
    const LinearStateSum sum{
        .part = part, .pairs = p.num_pairs(), .splits = splits, .parts = floats(parts), .state = floats(sums)};
    run_small(launch_linear_state_sum, sum);
    return sums;
  }

  // For the pairs.
  Tensor matrices(int64_t elements) const {
    return empty_as(args_.query, {args_.problem.num_pairs() * elements}, ScalarType::Float);
  }

 private:
  template <DType kDType>
  struct Of {
    using Channels = ChannelLaunches<kDType>;
    using Linear = LinearLaunches<kDType>;
  };

  const Checker& checker_;
  const ChannelArguments& args_;
  OnDevice device_;
};

int64_t num_weights(const ChannelProblem& p) { return p.value_dim * (p.head_dim + 1); }

void channel_attention(Call& call) {
  ChannelArguments args(call);
  const ScalarType type = args.query.scalar_type();
  prepare(call.checker, args, {&args.query, &args.key, &args.value});
  ChannelProblem& problem = args.problem;
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor state = empty_as(args.query, args.state_sizes(), ScalarType::Float);
  if (problem.batch > 0) {
    const ChannelsOnDevice device(call.checker, args);
    const Tensor sums = device.sum(problem, channel_part(problem), problem.num_tokens,
                                   [](auto of) { return decltype(of)::Channels::sum; });
    const Tensor weights = device.matrices(num_weights(problem));
    const ChannelWeightsParams params{
        .problem = problem, .sums = floats(sums), .state = floats(state), .weights = floats(weights)};
    device.run_small(launch_channel_weights, params);
    LinearOutputParams read{.problem = linear_problem(problem, problem.value_dim, problem.head_dim),
                            .state = floats(weights),
                            .out = token_tensor(out)};
    read.problem.num_queries = problem.num_values, read.problem.query = problem.value;
    if (problem.num_values > 0) device.run(read, [](auto of) { return decltype(of)::Linear::output; });
  }
  call.give(torch::stable::to(out, type), "out");
  call.give(state, "state");
}

void run_backward(const Checker& checker, const ChannelBackwardArguments& args, const OptionalTensor& grad_head_scale) {
  const ChannelProblem& problem = args.problem;
  const ChannelsOnDevice device(checker, args);
  const Tensor weights = device.matrices(num_weights(problem));
  device.run_small(launch_channel_weights,
                   ChannelWeightsParams{.problem = problem, .sums = floats(args.state), .weights = floats(weights)});
  LinearGradQueryParams values{.problem = linear_problem(problem, problem.value_dim, problem.head_dim),
                               .state = floats(weights),
                               .grad_out = token_tensor(args.grad_out),
                               .grad_query = token_tensor(args.grad_value)};
  values.problem.num_queries = problem.num_values, values.problem.query = problem.value;
  const Tensor grad_weights = device.sum(values, {problem.value_dim, problem.head_dim}, problem.num_values,
                                         [](auto of) { return decltype(of)::Linear::grad_query; });
  const Tensor grads = device.matrices(problem.state_size());
  device.run_small(launch_channel_weights_grad,
                   ChannelWeightsGradParams{.problem = problem,
                                            .state = floats(args.state),
                                            .grad_state = static_cast<const float*>(args.grad_state_data()),
                                            .grad_weights = floats(grad_weights),
                                            .grads = floats(grads),
                                            .grad_scale = grad_head_scale ? floats(args.grad_scale) : nullptr});
  if (grad_head_scale) {
    device.run_small(launch_channel_scale_sum, problem, floats(args.grad_scale), floats(*grad_head_scale));
  }
  if (problem.num_tokens == 0) return;
  device.run(ChannelTokensParams{.problem = problem,
                                 .grads = floats(grads),
                                 .grad_query = token_tensor(args.grad_query),
                                 .grad_key = token_tensor(args.grad_key)},
             [](auto of) { return decltype(of)::Channels::grad; });
}

void channel_attention_backward(Call& call) {
  ChannelBackwardArguments args(call);
  const ScalarType type = args.query.scalar_type();
  const bool is_wide = args.problem.dtype == DType::kFloat16;
  prepare(call.checker, args, {&args.query, &args.key, &args.value, &args.grad_out});
  OptionalTensor grad_head_scale;
  if (args.needs_scale) grad_head_scale = zeros_as(*args.head_scale);
  if (args.problem.batch > 0) run_backward(call.checker, args, grad_head_scale);
  if (is_wide) args.convert(DType::kFloat32, type);
  args.give(call, grad_head_scale ? *grad_head_scale : none_like(args.query));
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("channel_attention", &boxed<"channel_attention", channel_attention>);
  m.impl("channel_attention_backward", &boxed<"channel_attention_backward", channel_attention_backward>);
}
