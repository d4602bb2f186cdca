// The operators vitkernels::blockdiag_butterfly_multiply and its backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/cpu/weight_tasks.h"
#include "monarch/op/arguments.h"

namespace vitkernels {
namespace {

// Of the blocks of both weights, those of the first coming first, as many as are read.
Tensor pack(const MonarchProblem& problem, const Tensor& like, bool is_transposed, int64_t blocks) {
  MonarchPackParams params{.problem = problem, .is_transposed = is_transposed};
  const Kernel<MonarchPackParams>& kernel = vitkernels::kernel<MonarchPackParams>();
  const Tensor packed = empty_as(like, {kernel.parts(params)}, ScalarType::Byte);
  params.packed = packed.mutable_data_ptr();
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) { kernel.run(params, begin, end, nullptr); });
  return packed;
}

void blockdiag_butterfly_multiply(Call& call) {
  const MonarchArguments args(call);
  const Tensor out = empty_as(args.x, args.out_sizes(), args.x.scalar_type());
  const MonarchProblem& problem = args.problem;
  if (problem.rows > 0) {
    const Tensor packed = pack(problem, args.x, false, problem.num_blocks());
    const MonarchParams params{
        .problem = problem, .packed = packed.const_data_ptr(), .out = MonarchArguments::matrix(out)};
    run_kernel(kernel<MonarchParams>(), params, monarch_tasks(problem), 1, args.x);
  }
  call.give(out, "");
}

void blockdiag_butterfly_multiply_backward(Call& call) {
  const Tensor given = call.take<Tensor>("grad_out");
  const MonarchArguments args(call);
  const bool needs_w1 = call.take<bool>("need_w1"), needs_w2 = call.take<bool>("need_w2");
  call.checker.tensor("grad_out", given, args.x, args.x.scalar_type(), args.out_sizes());
  const Tensor grad_out = with_unit_last_stride(given);
  const MonarchProblem& problem = args.problem;
  const Tensor grad_x = empty_as(args.x);
  const bool has_rows = problem.rows > 0;
  const auto gradient = [&](bool is_needed, const Tensor& weight) {
    return !is_needed ? none_like(args.x) : has_rows ? empty_as(weight) : zeros_as(weight);
  };
  const Tensor grad_w1 = gradient(needs_w1, args.w1), grad_w2 = gradient(needs_w2, args.w2);
  if (has_rows) {
    const Tensor packed = needs_w2 ? pack(problem, args.x, false, problem.first.blocks) : none_like(args.x);
    const Tensor packed_transposed = pack(problem, args.x, true, problem.num_blocks());
    MonarchGradInputParams of_input{.problem = problem,
                                    .grad_out = MonarchArguments::matrix(grad_out),
                                    .grad_x = MonarchArguments::matrix(grad_x),
                                    .packed = needs_w2 ? packed.const_data_ptr() : nullptr,
                                    .packed_transposed = packed_transposed.const_data_ptr()};
    const Kernel<MonarchGradInputParams>& kernel_of_input = kernel<MonarchGradInputParams>();
    const Tensor inner = empty_as(args.x, {kernel_of_input.parts(of_input)}, ScalarType::Byte);
    of_input.inner = inner.mutable_data_ptr();
    run_kernel(kernel_of_input, of_input, monarch_tasks(problem), 1, args.x);
    const MonarchWeightTasks tasks(problem);
    const MonarchGradWeightParams of_weights{.problem = problem,
                                             .grad_out = of_input.grad_out,
                                             .inner = of_input.inner,
                                             .grad_first = grad_w1.mutable_data_ptr(),
                                             .grad_second = grad_w2.mutable_data_ptr()};
    const Kernel<MonarchGradWeightParams>& kernel_of_weights = kernel<MonarchGradWeightParams>();
    const int64_t begin = needs_w1 ? 0 : tasks.of_first(), end = needs_w2 ? tasks.count() : tasks.of_first();
    run_kernel(kernel_of_weights, of_weights, Range{begin, end}, 1, args.x);
  }
  call.give(grad_x, "grad_x");
  call.give(grad_w1, "grad_w1");
  call.give(grad_w2, "grad_w2");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("blockdiag_butterfly_multiply", &boxed<"blockdiag_butterfly_multiply", blockdiag_butterfly_multiply>);
  m.impl("blockdiag_butterfly_multiply_backward",
         &boxed<"blockdiag_butterfly_multiply_backward", blockdiag_butterfly_multiply_backward>);
}
