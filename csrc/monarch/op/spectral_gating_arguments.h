// The call of vitkernels::spectral_gating, its checks, and what its backward adds to it, on any device.
#pragma once

#include "common/boxed.h"
#include "monarch/spectral_gating.h"

namespace vitkernels {

struct SpectralGatingArguments {
  Tensor x, weight;
  SpectralGatingProblem problem;

  explicit SpectralGatingArguments(Call& call) : x(call.take<Tensor>("x")), weight(call.take<Tensor>("weight")) {
    check(call.checker);
    problem.x = maps(x);
    problem.weight = of_weight(weight);
  }

  static Maps maps(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

  static SpectralWeight of_weight(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

  bool is_empty() const { return x.numel() == 0; }

 private:
  void check(const Checker& checker) {
    checker.rank("x", x, 4, "(B, H, W, channels)");
    checker.rank("weight", weight, 4, "(H, W // 2 + 1, channels, 2)");
    problem.dtype = checker.element_type("x", x);
    checker.tensor("x", x, x, x.scalar_type());
    const ScalarType wide = statistics_type(x.scalar_type());
    problem.is_weight_wide = weight.scalar_type() == wide;
    checker.strided_like("weight", weight, x);
    checker.check(problem.is_weight_wide || weight.scalar_type() == x.scalar_type(), "weight is ",
                  dtype_text(weight.scalar_type()), ", takes ", dtype_text(x.scalar_type()),
                  x.scalar_type() == wide ? "" : " or float32");
    problem.batch = x.size(0), problem.rows = x.size(1), problem.columns = x.size(2), problem.channels = x.size(3);
    checker.check(problem.rows > 0 && problem.columns > 0, "x has shape ", Shape{x},
                  ", takes at least one row and one column");
    checker.shape("weight", weight, {problem.rows, problem.frequencies(), problem.channels, 2});
  }
};

struct SpectralGatingBackwardArguments {
  const Tensor grad_out;
  SpectralGatingArguments args;
  const bool needs_weight;
  Tensor grad_x, grad_weight;

  explicit SpectralGatingBackwardArguments(Call& call)
      : grad_out(call.take<Tensor>("grad_out")), args(call), needs_weight(call.take<bool>("need_weight")) {
    call.checker.tensor("grad_out", grad_out, args.x, args.x.scalar_type(), sizes_of(args.x));
    grad_x = empty_as(args.x);
    grad_weight = !needs_weight ? none_like(args.x) : args.is_empty() ? zeros_as(args.weight) : empty_as(args.weight);
  }

  void give(Call& call) const {
    call.give(grad_x, "grad_x");
    call.give(grad_weight, "grad_weight");
  }
};

}  // namespace vitkernels
