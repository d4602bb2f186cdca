// The operators vitkernels::spectral_gating and its backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/batch_shares.h"
#include "monarch/op/roots.h"
#include "monarch/op/spectral_gating_arguments.h"

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

// Plans, their roots, and tasks. Owns what the problem points to.
struct SpectralGatingTasks {
  std::vector<int64_t> column_places, row_places;
  Tensor roots;

  SpectralGatingTasks(const Tensor& x, SpectralGatingProblem& problem) {
    problem.of_columns = MixedRadix(problem.rows), problem.of_rows = MixedRadix(problem.columns);
    column_places = places_of(problem.of_columns), row_places = places_of(problem.of_rows);
    problem.column_places = column_places.data(), problem.row_places = row_places.data();
    const bool is_double = x.scalar_type() == ScalarType::Double;
    problem.channel_group = vector_bytes(isa()) / int64_t(is_double ? sizeof(double) : sizeof(float));
    problem.shares = batch_shares(problem.groups(), problem.batch);
    const int64_t count = problem.of_columns.roots() + problem.of_rows.roots();
    roots = empty_as(x, {2 * count}, statistics_type(x.scalar_type()));
    dispatch_statistics(roots, [&]<class T>(T) {
      write_roots(problem.of_rows, write_roots(problem.of_columns, static_cast<T*>(roots.mutable_data_ptr())));
    });
    problem.roots = roots.const_data_ptr();
  }
};

void spectral_gating(Call& call) {
  SpectralGatingArguments args(call);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) {
    const SpectralGatingTasks tasks(args.x, args.problem);
    const SpectralGatingParams params{.problem = args.problem, .out = args.maps(out)};
    run_kernel(kernel<SpectralGatingParams>(), params, args.problem.tasks(), args.problem.shares, args.x);
  }
  call.give(out, "");
}

void spectral_gating_backward(Call& call) {
  SpectralGatingBackwardArguments backward(call);
  SpectralGatingArguments& args = backward.args;
  if (!args.is_empty()) {
    const SpectralGatingTasks tasks(args.x, args.problem);
    SpectralGatingGradParams params{
        .problem = args.problem,
        .grad_out = args.maps(backward.grad_out),
        .grad_x = args.maps(backward.grad_x),
        .grad_weight = backward.needs_weight ? args.of_weight(backward.grad_weight) : SpectralWeight{}};
    const Kernel<SpectralGatingGradParams>& kernel = vitkernels::kernel<SpectralGatingGradParams>();
    const Tensor partial = empty_as(args.x, {kernel.parts(params)}, ScalarType::Byte);
    params.partial = partial.mutable_data_ptr();
    run_kernel(kernel, params, args.problem.tasks(), args.problem.shares, args.x);
    if (partial.numel() > 0) {
      parallel_ranges(args.problem.groups(), 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    }
  }
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("spectral_gating", &boxed<"spectral_gating", spectral_gating>);
  m.impl("spectral_gating_backward", &boxed<"spectral_gating_backward", spectral_gating_backward>);
}
