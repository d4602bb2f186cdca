// The operators vitkernels::linear_attention and vitkernels::linear_attention_backward on a GPU.
#include "cuda/read_integers.h"
#include "linear_attention/op/arguments.h"
#include "linear_attention/op/on_device.h"

namespace vitkernels {
namespace {

// One call's kernels.
class LinearOnDevice {
 public:
  LinearOnDevice(const Checker& checker, const LinearArguments& args)
      : checker_(checker), args_(args), device_(args.query) {
    const LinearProblem& p = args.problem;
    const int64_t largest = p.dtype == DType::kFloat32 ? kMaxLinearDimFloat32 : kMaxLinearDim;
    checker.check(p.dtype != DType::kFloat64, "query is float64 on CUDA, takes float32, bfloat16 or float16");
    checker.check(
        std::max(p.head_dim, p.value_dim) <= largest, "query or value has head dimension ",
        std::max(p.head_dim, p.value_dim), " on CUDA, takes at most ", largest,
        p.dtype == DType::kFloat32 ? " in float32, which float16 becomes, and bfloat16 for the focused map" : "");
  }

  // Runs a kernel; `launch(launches)` is its launch.
  template <class Params, class Launch>
  void run(const Params& params, Launch&& launch) const {
    const auto run = [&](auto launches) { return launch(launches)(params, args_.allow_tf32, device_.stream()); };
    check_cuda(checker_, args_.problem.dtype == DType::kFloat32 ? run(LinearLaunches<DType::kFloat32>{})
                                                                : run(LinearLaunches<DType::kBFloat16>{}));
  }

  // The same of a kernel that leaves parts of a state, which `sum` adds up.
  template <class Params, class Launch>
  void sum(Params& params, int64_t tokens, Launch&& launch, LinearStateSum sum) const {
    const LinearProblem& p = args_.problem;
    sum.part = {p.head_dim, p.value_dim}, sum.pairs = p.batch * p.kv_heads;
    sum.splits = params.splits = linear_blocks_of_pair(sum.pairs, tokens);
    const Tensor parts = empty_as(args_.query, {sum.splits * sum.pairs * sum.part.size()}, ScalarType::Float);
    params.parts = floats(parts);
    sum.parts = floats(parts);
    run(params, launch);
    check_cuda(checker_, launch_linear_state_sum(sum, device_.stream()));
  }

 private:
  const Checker& checker_;
  const LinearArguments& args_;
  OnDevice device_;
};

// Operands that become float32. float16 holds no sums over many tokens; TF32 has its bits, and float's range. The
// gradient of the focused map is a difference of larger numbers, for which neither has bits enough.
bool is_widened(const LinearArguments& args) {
  const LinearProblem& p = args.problem;
  return p.dtype == DType::kFloat16 || (p.dtype == DType::kBFloat16 && p.feature_map == FeatureMap::kFocused);
}

void bring_near(LinearArguments& args) {
  for (Tensor* t : {&args.query, &args.key, &args.value}) *t = with_near_tokens(*t);
  args.attach();
}

template <class Arguments>
void widen(Arguments& args) {
  args.convert(DType::kFloat32, ScalarType::Float);
  args.allow_tf32 = args.problem.feature_map != FeatureMap::kFocused;
}

template <bool kIsPacked>
void linear_attention(Call& call) {
  LinearArguments args(call, kIsPacked, device_integers_reader());
  const ScalarType type = args.query.scalar_type();
  bring_near(args);
  if (is_widened(args)) widen(args);
  const LinearProblem& problem = args.problem;
  const Tensor out = args.result(args.query, args.out_sizes());
  const Tensor state = empty_as(args.query, args.state_sizes(), ScalarType::Float);
  const LinearOnDevice device(call.checker, args);
  if (problem.batch > 0) {
    LinearStateParams params{.problem = problem};
    device.sum(params, problem.num_keys, [](auto launches) { return launches.state; }, {.state = floats(state)});
  }
  if (out.numel() > 0) {
    const LinearOutputParams params{.problem = problem, .state = floats(state), .out = token_tensor(out)};
    device.run(params, [](auto launches) { return launches.output; });
  }
  call.give(torch::stable::to(out, type), "out");
  call.give(state, "state");
}

template <bool kIsPacked>
void linear_attention_backward(Call& call) {
  LinearBackwardArguments args(call, kIsPacked, device_integers_reader());
  const ScalarType type = args.query.scalar_type();
  const bool is_wide = is_widened(args);
  bring_near(args);
  if (args.grad_out) args.grad_out = with_near_tokens(*args.grad_out);
  if (is_wide) widen(args);
  const LinearOnDevice device(call.checker, args);
  if (args.is_read()) {
    LinearGradQueryParams params = args.grad_query_params();
    device.sum(params, args.problem.num_queries, [](auto launches) { return launches.grad_query; },
               {.factor = float(args.problem.scale),
                .other = args.grad_of_state ? floats(*args.grad_of_state) : nullptr,
                .state = floats(args.grad_state)});
  }
  if (args.grad_key.numel() > 0) {
    device.run(args.grad_key_params(), [](auto launches) { return launches.grad_key; });
  }
  if (is_wide) args.convert(DType::kFloat32, type);
  args.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("linear_attention", &boxed<"linear_attention", linear_attention<false>>);
  m.impl("linear_attention_backward", &boxed<"linear_attention_backward", linear_attention_backward<false>>);
  m.impl("linear_attention_varlen", &boxed<"linear_attention_varlen", linear_attention<true>>);
  m.impl("linear_attention_varlen_backward",
         &boxed<"linear_attention_varlen_backward", linear_attention_backward<true>>);
}
