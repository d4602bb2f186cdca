// The operators vitkernels::spectral_gating and its backward on the CPU.
#include "common/boxed.h"
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/batch_shares.h"
#include "monarch/op/roots.h"
#include "monarch/spectral_gating.h"

namespace vitkernels {
namespace {

template <class T>
T* write_roots(const MixedRadix& plan, T* to) {
  const Roots roots(plan.length);
  int64_t n = plan.length;
  for (int s = 0; s < plan.stages; n /= plan.radix[s++]) {
    const int64_t radix = plan.radix[s];
    if (!MixedRadix::has_kernel(radix)) {
      for (int64_t k = 0; k < radix; ++k) to = roots.write(k * (plan.length / radix) * 4, to);
    }
    for (int64_t j = 0; j < n / radix; ++j) {
      for (int64_t k = 1; k < radix; ++k) to = roots.write(j * k * (plan.length / n) * 4, to);
    }
  }
  return to;
}

std::vector<int64_t> places_of(const MixedRadix& plan) {
  std::vector<int64_t> places(plan.length);
  for (int64_t k = 0; k < plan.length; ++k) places[k] = plan.place(k);
  return places;
}

// Owns what the problem points to.
struct SpectralGatingArguments {
  Tensor x, weight;
  std::vector<int64_t> column_places, row_places;
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

  // What a call with elements needs besides: plans, their roots, and tasks.
  Tensor prepare() {
    problem.of_columns = MixedRadix(problem.rows), problem.of_rows = MixedRadix(problem.columns);
    column_places = places_of(problem.of_columns), row_places = places_of(problem.of_rows);
    problem.column_places = column_places.data(), problem.row_places = row_places.data();
    const bool is_double = x.scalar_type() == ScalarType::Double;
    problem.channel_group = vector_bytes(isa()) / int64_t(is_double ? sizeof(double) : sizeof(float));
    problem.shares = batch_shares(problem.groups(), problem.batch);
    const int64_t count = problem.of_columns.roots() + problem.of_rows.roots();
    const Tensor roots = empty_as(x, {2 * count}, statistics_type(x.scalar_type()));
    dispatch_statistics(roots, [&]<class T>(T) {
      write_roots(problem.of_rows, write_roots(problem.of_columns, static_cast<T*>(roots.mutable_data_ptr())));
    });
    problem.roots = roots.const_data_ptr();
    return roots;
  }

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

void spectral_gating(Call& call) {
  SpectralGatingArguments args(call);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) {
    const Tensor roots = args.prepare();
    const SpectralGatingParams params{.problem = args.problem, .out = args.maps(out)};
    run_kernel(kernel<SpectralGatingParams>(), params, args.problem.tasks(), args.problem.shares, args.x);
  }
  call.give(out, "");
}

void spectral_gating_backward(Call& call) {
  const Tensor grad_out = call.take<Tensor>("grad_out");
  SpectralGatingArguments args(call);
  const bool needs_weight = call.take<bool>("need_weight");
  call.checker.tensor("grad_out", grad_out, args.x, args.x.scalar_type(), sizes_of(args.x));
  const Tensor grad_x = empty_as(args.x);
  const Tensor grad_weight = !needs_weight     ? none_like(args.x)
                             : args.is_empty() ? zeros_as(args.weight)
                                               : empty_as(args.weight);
  if (!args.is_empty()) {
    const Tensor roots = args.prepare();
    SpectralGatingGradParams params{.problem = args.problem,
                                    .grad_out = args.maps(grad_out),
                                    .grad_x = args.maps(grad_x),
                                    .grad_weight = needs_weight ? args.of_weight(grad_weight) : SpectralWeight{}};
    const Kernel<SpectralGatingGradParams>& kernel = vitkernels::kernel<SpectralGatingGradParams>();
    const Tensor partial = empty_as(args.x, {kernel.parts(params)}, ScalarType::Byte);
    params.partial = partial.mutable_data_ptr();
    run_kernel(kernel, params, args.problem.tasks(), args.problem.shares, args.x);
    if (partial.numel() > 0) {
      parallel_ranges(args.problem.groups(), 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    }
  }
  call.give(grad_x, "grad_x");
  call.give(grad_weight, "grad_weight");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("spectral_gating", &boxed<"spectral_gating", spectral_gating>);
  m.impl("spectral_gating_backward", &boxed<"spectral_gating_backward", spectral_gating_backward>);
}
