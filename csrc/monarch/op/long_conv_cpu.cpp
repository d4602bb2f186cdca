// The operators vitkernels::long_conv and its backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/batch_shares.h"
#include "monarch/op/long_conv_arguments.h"
#include "monarch/op/roots.h"

namespace vitkernels {
namespace {

template <class T>
void write_twiddles(const LongConvPlan& plan, T* to) {
  const Roots roots(plan.length);
  for (int64_t j = 0; j < plan.length / LongConvPlan::kEnds; ++j) {
    for (int64_t k = 0; k < LongConvPlan::kEnds; ++k) to = roots.write(j * (4 * k + 1), to);
  }
  int64_t n = plan.length / LongConvPlan::kEnds;
  for (int s = 1; s < plan.stages - 1; n /= plan.radix[s++]) {
    for (int64_t j = 0; j < n / plan.radix[s]; ++j) {
      for (int64_t k = 1; k < plan.radix[s]; ++k) to = roots.write(j * k * (plan.length / n) * 4, to);
    }
  }
}

// What a call with elements needs besides: a plan, its twiddles, and tasks.
class LongConvTasks {
 public:
  explicit LongConvTasks(const LongConvArguments& args) : problem(args.problem), plan_(problem.length) {
    const bool is_double = problem.dtype == DType::kFloat64;
    problem.channel_group = vector_bytes(isa()) / int64_t(is_double ? sizeof(double) : sizeof(float));
    problem.shares = batch_shares(problem.groups(), problem.batch);
    twiddles_ = empty_as(args.x, {2 * plan_.twiddles()}, statistics_type(problem.dtype));
    dispatch_statistics(twiddles_,
                        [&]<class T>(T) { write_twiddles(plan_, static_cast<T*>(twiddles_.mutable_data_ptr())); });
    problem.plan = &plan_;
    problem.twiddles = twiddles_.const_data_ptr();
  }
  LongConvTasks(const LongConvTasks&) = delete;

  LongConvProblem problem;

 private:
  const LongConvPlan plan_;
  Tensor twiddles_;
};

void long_conv(Call& call) {
  const LongConvArguments args(call);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) {
    const LongConvTasks tasks(args);
    const LongConvParams params{.problem = tasks.problem, .out = args.signals(out)};
    run_kernel(kernel<LongConvParams>(), params, params.problem.tasks(), params.problem.shares, args.x);
  }
  call.give(out, "");
}

void long_conv_backward(Call& call) {
  const LongConvBackwardArguments backward(call);
  const LongConvArguments& args = backward.args;
  if (!args.is_empty()) {
    const LongConvTasks tasks(args);
    LongConvGradParams params{.problem = tasks.problem,
                              .grad_out = args.signals(backward.grad_out),
                              .grad_x = args.signals(backward.grad_x),
                              .grad_filter = backward.of_grad_filter()};
    const Kernel<LongConvGradParams>& kernel = vitkernels::kernel<LongConvGradParams>();
    const Tensor partial = empty_as(args.x, {kernel.parts(params)}, ScalarType::Byte);
    params.partial = partial.mutable_data_ptr();
    run_kernel(kernel, params, params.problem.tasks(), params.problem.shares, args.x);
    if (partial.numel() > 0) {
      parallel_ranges(params.problem.groups(), 1,
                      [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    }
  }
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("long_conv", &boxed<"long_conv", long_conv>);
  m.impl("long_conv_backward", &boxed<"long_conv_backward", long_conv_backward>);
}
