// What an attention's backward operator gets besides the forward's arguments.
#pragma once

#include <tuple>
#include <utility>

#include "attention/op/arguments.h"

namespace vitkernels {

// Of query, key, value and the score terms, in the order of the arguments.
using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Packed sequences have no grid.
using VarlenBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline VarlenBackward without_grid(const Backward& grads) {
  return [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    return VarlenBackward{std::get<kIndex>(grads)...};
  }(std::make_index_sequence<std::tuple_size_v<VarlenBackward>>());
}

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
