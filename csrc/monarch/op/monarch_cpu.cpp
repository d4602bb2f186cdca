// The operators vitkernels::blockdiag_butterfly_multiply and its backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "monarch/cpu/weight_tasks.h"
#include "monarch/op/arguments.h"

namespace vitkernels {
namespace {

// Bytes of both weights, packed.
int64_t packed_size(const MonarchPackParams& params) { return kernel<MonarchPackParams>().parts(params); }

// Of the blocks of both weights, those of the first coming first, as many as are read.
Tensor pack(const MonarchProblem& problem, const Tensor& like, bool is_transposed, int64_t blocks) {
  MonarchPackParams params{.problem = problem, .is_transposed = is_transposed};
  const Kernel<MonarchPackParams>& kernel = vitkernels::kernel<MonarchPackParams>();
  const Tensor packed = empty_as(like, {packed_size(params)}, ScalarType::Byte);
  params.packed = packed.mutable_data_ptr();
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) { kernel.run(params, begin, end, nullptr); });
  return packed;
}

Inner inner_of(const Tensor& inner, Inner::Use use) {
  return inner.size(0) == 0 ? Inner{} : Inner{use, MonarchArguments::matrix(inner)};
}

// With the epilogue, or for the backward what comes before the activation.
Tensor multiply(const MonarchArguments& args, Activation activation, const Tensor& packed, Inner inner) {
  const Tensor out = empty_as(args.x, args.out_sizes(), args.x.scalar_type());
  const MonarchParams params{.problem = args.problem,
                             .packed = packed.const_data_ptr(),
                             .inner = inner,
                             .bias = args.bias_data(),
                             .activation = activation,
                             .out = MonarchArguments::matrix(out)};
  run_kernel(kernel<MonarchParams>(), params, monarch_tasks(args.problem), 1, args.x);
  return out;
}

void blockdiag_butterfly_pack(Call& call) {
  const Tensor w1 = call.take<Tensor>("w1"), w2 = call.take<Tensor>("w2");
  MonarchProblem problem;
  call.checker.defined("w1", w1);
  problem.dtype = call.checker.element_type("w1", w1);
  MonarchArguments::set_weights(call.checker, w1, w2, w1, problem);
  const Tensor first = as_contiguous(w1), second = as_contiguous(w2);
  problem.first.data = first.const_data_ptr(), problem.second.data = second.const_data_ptr();
  call.give(pack(problem, w1, false, problem.num_blocks()), "");
}

// As the operator above left the weights, or packed for this call.
Tensor packed_weights(const MonarchArguments& args, const OptionalTensor& given) {
  return given ? as_contiguous(*given) : pack(args.problem, args.x, false, args.problem.num_blocks());
}

void blockdiag_butterfly_multiply(Call& call) {
  const MonarchArguments args(call);
  const auto given = call.take<OptionalTensor>("packed");
  if (given) {
    call.checker.tensor("packed", *given, args.x, ScalarType::Byte, {packed_size({.problem = args.problem})});
  }
  const MonarchProblem& problem = args.problem;
  const Tensor inner = empty_as(args.x, args.inner_sizes(), args.x.scalar_type());
  Tensor out;
  if (problem.rows == 0) {
    out = empty_as(args.x, args.out_sizes(), args.x.scalar_type());
  } else {
    const Tensor packed = packed_weights(args, given);
    out = multiply(args, args.activation, packed, inner_of(inner, Inner::Use::kWrite));
  }
  call.give(out, "out");
  call.give(inner, "inner");
}

class MonarchBackward : public MonarchBackwardArguments {
 public:
  using MonarchBackwardArguments::MonarchBackwardArguments;

  void run() {
    if (problem.rows == 0) return;
    Tensor packed = none_like(args.x);
    if (has_activation() || (needs_w2 && !args.keeps_inner)) {
      packed = pack(problem, args.x, false, has_activation() ? problem.num_blocks() : problem.first.blocks);
    }
    if (has_activation() || needs_bias) differentiate_epilogue(packed);
    of_products(packed);
  }

 private:
  void differentiate_epilogue(const Tensor& packed) {
    MonarchGradEpilogueParams params{.dtype = problem.dtype,
                                     .rows = problem.rows,
                                     .columns = problem.outputs(),
                                     .activation = args.activation,
                                     .grad_out = MonarchArguments::matrix(grad_out)};
    const Tensor before = has_activation() ? multiply(args, Activation::kNone, packed, kept) : grad_out;
    const Tensor grad_before = has_activation() ? empty_as(before) : grad_out;
    params.before = MonarchArguments::matrix(before), params.grad_before = MonarchArguments::matrix(grad_before);
    const Tensor sums =
        needs_bias ? empty_as(args.x, {problem.outputs()}, statistics_type(problem.dtype)) : none_like(args.x);
    params.grad_bias = needs_bias ? sums.mutable_data_ptr() : nullptr;
    const Kernel<MonarchGradEpilogueParams>& of_epilogue = kernel<MonarchGradEpilogueParams>();
    parallel_ranges((problem.outputs() + kEpilogueColumns - 1) / kEpilogueColumns, 1,
                    [&](int64_t begin, int64_t end) { of_epilogue.run(params, begin, end, nullptr); });
    grad_out = grad_before;
    if (needs_bias) grad_bias = torch::stable::to(sums, grad_bias.scalar_type());
  }

  void of_products(const Tensor& packed) {
    const Tensor packed_transposed = pack(problem, args.x, true, problem.num_blocks());
    MonarchGradInputParams of_input{.problem = problem,
                                    .grad_out = MonarchArguments::matrix(grad_out),
                                    .grad_x = MonarchArguments::matrix(grad_x),
                                    .packed = packed.const_data_ptr(),
                                    .packed_transposed = packed_transposed.const_data_ptr(),
                                    .needs_inner = needs_w2,
                                    .kept = kept};
    const Kernel<MonarchGradInputParams>& kernel_of_input = kernel<MonarchGradInputParams>();
    const Tensor shared = empty_as(args.x, {kernel_of_input.parts(of_input)}, ScalarType::Byte);
    of_input.shared = shared.mutable_data_ptr();
    run_kernel(kernel_of_input, of_input, monarch_tasks(problem), 1, args.x);
    const MonarchWeightTasks tasks(problem);
    const MonarchGradWeightParams of_weights{.problem = problem,
                                             .grad_out = of_input.grad_out,
                                             .shared = of_input.shared,
                                             .grad_first = grad_w1.mutable_data_ptr(),
                                             .grad_second = grad_w2.mutable_data_ptr()};
    const Kernel<MonarchGradWeightParams>& kernel_of_weights = kernel<MonarchGradWeightParams>();
    const int64_t begin = needs_w1 ? 0 : tasks.of_first(), end = needs_w2 ? tasks.count() : tasks.of_first();
    run_kernel(kernel_of_weights, of_weights, Range{begin, end}, 1, args.x);
  }

  const Inner kept = inner_of(inner, Inner::Use::kRead);
};

void blockdiag_butterfly_multiply_backward(Call& call) {
  MonarchBackward backward(call);
  backward.run();
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("blockdiag_butterfly_multiply", &boxed<"blockdiag_butterfly_multiply", blockdiag_butterfly_multiply>);
  m.impl("blockdiag_butterfly_pack", &boxed<"blockdiag_butterfly_pack", blockdiag_butterfly_pack>);
  m.impl("blockdiag_butterfly_multiply_backward",
         &boxed<"blockdiag_butterfly_multiply_backward", blockdiag_butterfly_multiply_backward>);
}
