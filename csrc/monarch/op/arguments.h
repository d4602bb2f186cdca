// From the tensors of a Monarch product to the Params of its kernels, with all checks.
#pragma once

#include "common/boxed.h"
#include "monarch/monarch.h"

namespace vitkernels {

// Owns what the problem points to.
struct MonarchArguments {
  Tensor x, w1, w2;
  OptionalTensor bias;
  ScalarType bias_type = ScalarType::Float;  // as it was given; `bias` is in the type of sums
  Activation activation;
  bool allow_tf32, keeps_inner;
  MonarchProblem problem;

  explicit MonarchArguments(Call& call)
      : x(call.take<Tensor>("x")),
        w1(call.take<Tensor>("w1")),
        w2(call.take<Tensor>("w2")),
        bias(call.take<OptionalTensor>("bias")) {
    const auto given = call.take<int64_t>("activation");
    allow_tf32 = call.take<bool>("allow_tf32");
    keeps_inner = call.take<bool>("keeps_inner");
    check(call.checker);
    call.checker.check(given >= 0 && given < kNumActivations, "activation is ", given, ", takes 0 to ",
                       kNumActivations - 1);
    activation = Activation(given);
    if (bias)
      bias_type = bias->scalar_type(), bias = as_contiguous(torch::stable::to(*bias, statistics_type(problem.dtype)));
    x = with_unit_last_stride(x), w1 = as_contiguous(w1), w2 = as_contiguous(w2);
    problem.x = matrix(x);
    problem.first.data = w1.const_data_ptr(), problem.second.data = w2.const_data_ptr();
  }

  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }

  static Matrix matrix(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0)}; }

  std::vector<int64_t> out_sizes() const { return {problem.rows, problem.outputs()}; }
  std::vector<int64_t> inner_sizes() const { return {keeps_inner ? problem.rows : 0, problem.inner()}; }

  // Of a dtype that is `like`'s: what the problem says of the weights, but for where they are.
  static void set_weights(const Checker& checker, const Tensor& w1, const Tensor& w2, const Tensor& like,
                          MonarchProblem& problem) {
    checker.rank("w1", w1, 3, "(k, q, p)");
    checker.rank("w2", w2, 3, "(l, s, r)");
    checker.tensor("w1", w1, like, like.scalar_type());
    checker.tensor("w2", w2, like, like.scalar_type());
    problem.first = {nullptr, w1.size(0), w1.size(1), w1.size(2)};
    problem.second = {nullptr, w2.size(0), w2.size(1), w2.size(2)};
    for (const auto& [name, w] : {std::pair{"w1", &w1}, {"w2", &w2}}) {
      checker.check(w->numel() > 0, name, " has shape ", Shape{sizes_of(*w)}, ", takes at least one element");
    }
    checker.check(problem.second.blocks * problem.second.inputs == problem.inner(), "w2 has shape ",
                  Shape{sizes_of(w2)}, ", takes ", problem.inner(), " columns in all blocks together (w1's rows)");
  }

 private:
  void check(const Checker& checker) {
    checker.rank("x", x, 2, "(rows, k * p)");
    problem.dtype = checker.element_type("x", x);
    set_weights(checker, w1, w2, x, problem);
    problem.rows = x.size(0);
    checker.size("x", x, 1, problem.inputs(), "the columns of w1's blocks together");
    if (!bias) return;
    const ScalarType sums = statistics_type(problem.dtype);
    checker.tensor("bias", *bias, x, bias->scalar_type() == sums ? sums : x.scalar_type(), {problem.outputs()});
  }
};

// Those of the backward, and its results.
struct MonarchBackwardArguments {
  Tensor grad_out;
  const MonarchArguments args;
  Tensor inner;  // what the forward kept
  const bool needs_w1, needs_w2, needs_bias;
  const MonarchProblem& problem = args.problem;
  Tensor grad_x = empty_as(args.x), grad_w1, grad_w2, grad_bias = none_like(args.x);

  explicit MonarchBackwardArguments(Call& call)
      : grad_out(call.take<Tensor>("grad_out")),
        args(call),
        inner(call.take<Tensor>("inner")),
        needs_w1(call.take<bool>("need_w1")),
        needs_w2(call.take<bool>("need_w2")),
        needs_bias(call.take<bool>("need_bias") && args.bias) {
    call.checker.tensor("grad_out", grad_out, args.x, args.x.scalar_type(), args.out_sizes());
    call.checker.tensor("inner", inner, args.x, args.x.scalar_type(), args.inner_sizes());
    grad_out = with_unit_last_stride(grad_out), inner = with_unit_last_stride(inner);
    grad_w1 = gradient(needs_w1, args.w1), grad_w2 = gradient(needs_w2, args.w2);
    if (needs_bias) grad_bias = zeros_as(args.x, {problem.outputs()}, args.bias_type);
  }

  bool has_activation() const { return args.activation != Activation::kNone; }

  void give(Call& call) const {
    call.give(grad_x, "grad_x");
    call.give(grad_w1, "grad_w1");
    call.give(grad_w2, "grad_w2");
    call.give(grad_bias, "grad_bias");
  }

 private:
  Tensor gradient(bool is_needed, const Tensor& like) const {
    return !is_needed ? none_like(args.x) : problem.rows > 0 ? empty_as(like) : zeros_as(like);
  }
};

}  // namespace vitkernels
