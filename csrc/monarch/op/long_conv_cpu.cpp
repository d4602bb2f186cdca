// The operators vitkernels::long_conv and its backward on the CPU.
#include "common/boxed.h"
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/batch_shares.h"
#include "monarch/long_conv.h"
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

// Owns what the problem points to.
struct LongConvArguments {
  Tensor x, filter;
  bool channels_last, is_causal;
  LongConvPlan plan{1};
  LongConvProblem problem;

  explicit LongConvArguments(Call& call)
      : x(call.take<Tensor>("x")),
        filter(call.take<Tensor>("filter")),
        channels_last(call.take<bool>("channels_last")),
        is_causal(call.take<bool>("is_causal")) {
    check(call.checker);
    problem.x = signals(x);
    problem.filter = of_filter(filter);
    problem.plan = &plan;
  }

  Signals signals(const Tensor& t) const {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(channel_axis()), t.stride(3 - channel_axis())};
  }

  static Signals of_filter(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), 0, t.stride(0), t.stride(1)};
  }

  bool is_empty() const { return x.numel() == 0; }

  // What a call with elements needs besides: a plan, its twiddles, and tasks.
  Tensor prepare() {
    plan = LongConvPlan(problem.length);
    const bool is_double = x.scalar_type() == ScalarType::Double;
    problem.channel_group = vector_bytes(isa()) / int64_t(is_double ? sizeof(double) : sizeof(float));
    problem.shares = batch_shares(problem.groups(), problem.batch);
    const Tensor twiddles = empty_as(x, {2 * plan.twiddles()}, statistics_type(x.scalar_type()));
    dispatch_statistics(twiddles,
                        [&]<class T>(T) { write_twiddles(plan, static_cast<T*>(twiddles.mutable_data_ptr())); });
    problem.twiddles = twiddles.const_data_ptr();
    return twiddles;
  }

 private:
  int64_t channel_axis() const { return channels_last ? 2 : 1; }

  void check(const Checker& checker) {
    checker.rank("x", x, 3, channels_last ? "(B, N, channels)" : "(B, channels, N)");
    checker.rank("filter", filter, 2, "(channels, taps)");
    problem.dtype = checker.element_type("x", x);
    checker.tensor("x", x, x, x.scalar_type());
    checker.tensor("filter", filter, x, x.scalar_type());
    problem.batch = x.size(0), problem.channels = x.size(channel_axis()), problem.length = x.size(3 - channel_axis());
    problem.taps = filter.size(1);
    checker.size("filter", filter, 0, problem.channels, "the channels of x");
    checker.check(problem.length > 0, "x has shape ", Shape{sizes_of(x)}, ", takes at least one position");
    if (is_causal) {
      checker.check(0 < problem.taps && problem.taps <= problem.length, "filter has ", problem.taps,
                    " taps, takes 1 to ", problem.length, " (the length of x) if it is causal");
    } else {
      checker.check(problem.taps % 2 == 1 && problem.taps < 2 * problem.length, "filter has ", problem.taps,
                    " taps, takes an odd number of them up to ", 2 * problem.length - 1,
                    " (twice the length of x, less one) if it is not causal");
    }
    problem.first_lag = is_causal ? 0 : -(problem.taps / 2);
  }
};

void long_conv(Call& call) {
  LongConvArguments args(call);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) {
    const Tensor twiddles = args.prepare();
    const LongConvParams params{.problem = args.problem, .out = args.signals(out)};
    run_kernel(kernel<LongConvParams>(), params, args.problem.tasks(), args.problem.shares, args.x);
  }
  call.give(out, "");
}

void long_conv_backward(Call& call) {
  const Tensor grad_out = call.take<Tensor>("grad_out");
  LongConvArguments args(call);
  const bool needs_filter = call.take<bool>("need_filter");
  call.checker.tensor("grad_out", grad_out, args.x, args.x.scalar_type(), sizes_of(args.x));
  const Tensor grad_x = empty_as(args.x);
  const Tensor grad_filter = !needs_filter     ? none_like(args.x)
                             : args.is_empty() ? zeros_as(args.filter)
                                               : empty_as(args.filter);
  if (!args.is_empty()) {
    const Tensor twiddles = args.prepare();
    LongConvGradParams params{.problem = args.problem,
                              .grad_out = args.signals(grad_out),
                              .grad_x = args.signals(grad_x),
                              .grad_filter = needs_filter ? LongConvArguments::of_filter(grad_filter) : Signals{}};
    const Kernel<LongConvGradParams>& kernel = vitkernels::kernel<LongConvGradParams>();
    const Tensor partial = empty_as(args.x, {kernel.parts(params)}, ScalarType::Byte);
    params.partial = partial.mutable_data_ptr();
    run_kernel(kernel, params, args.problem.tasks(), args.problem.shares, args.x);
    if (partial.numel() > 0) {
      parallel_ranges(args.problem.groups(), 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    }
  }
  call.give(grad_x, "grad_x");
  call.give(grad_filter, "grad_filter");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("long_conv", &boxed<"long_conv", long_conv>);
  m.impl("long_conv_backward", &boxed<"long_conv_backward", long_conv_backward>);
}
