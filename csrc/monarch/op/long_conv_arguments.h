// From the tensors of a long convolution to the Params of its kernels, with all checks.
#pragma once

#include "common/boxed.h"
#include "monarch/long_conv.h"

namespace vitkernels {

// Owns what the problem points to.
struct LongConvArguments {
  Tensor x, filter;
  bool channels_last, is_causal;
  LongConvProblem problem;

  explicit LongConvArguments(Call& call)
      : x(call.take<Tensor>("x")),
        filter(call.take<Tensor>("filter")),
        channels_last(call.take<bool>("channels_last")),
        is_causal(call.take<bool>("is_causal")) {
    check(call.checker);
    problem.x = signals(x);
    problem.filter = of_filter(filter);
  }

  Signals signals(const Tensor& t) const {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(channel_axis()), t.stride(3 - channel_axis())};
  }

  static Signals of_filter(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), 0, t.stride(0), t.stride(1)};
  }

  bool is_empty() const { return x.numel() == 0; }

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

// Those of the backward, and its results.
struct LongConvBackwardArguments {
  Tensor grad_out;
  LongConvArguments args;
  const bool needs_filter;
  Tensor grad_x, grad_filter;

  explicit LongConvBackwardArguments(Call& call)
      : grad_out(call.take<Tensor>("grad_out")), args(call), needs_filter(call.take<bool>("need_filter")) {
    call.checker.tensor("grad_out", grad_out, args.x, args.x.scalar_type(), sizes_of(args.x));
    grad_x = empty_as(args.x);
    grad_filter = !needs_filter ? none_like(args.x) : args.is_empty() ? zeros_as(args.filter) : empty_as(args.filter);
  }

  Signals of_grad_filter() const { return needs_filter ? LongConvArguments::of_filter(grad_filter) : Signals{}; }

  void give(Call& call) const {
    call.give(grad_x, "grad_x");
    call.give(grad_filter, "grad_filter");
  }
};

}  // namespace vitkernels
