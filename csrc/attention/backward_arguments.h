// What an attention's backward operator gets besides the forward's arguments.
#pragma once

#include "attention/arguments.h"

namespace vitkernels {

struct NeededGradients {
  bool head_scale, bias, key_bias, multiplier;
  WantedOnGrid on_grid = {};
};

struct BackwardArguments {
  const Tensor& grad_out;
  OptionalTensor grad_lse;
  const Tensor& out;
  const Tensor& lse;
  NeededGradients needed;

  void check(const Checker& checker, const AttentionArguments& args) const {
    for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
      checker.strided_like(name, *t, args.query);
      checker.dtype(name, *t, args.query.scalar_type());
      checker.shape(name, *t, args.out_sizes());
    }
    const Tensor* rows[] = {&lse, grad_lse ? &*grad_lse : nullptr};
    for (const Tensor* t : rows) {
      const char* name = t == &lse ? "lse" : "grad_lse";
      if (!t) continue;
      checker.strided_like(name, *t, args.query);
      checker.dtype(name, *t, statistics_type(args.dtype));
      checker.shape(name, *t, args.lse_sizes());
    }
  }
};

}  // namespace vitkernels
