// The operators vitkernels::linear_attention_quadratic and vitkernels::linear_attention_quadratic_backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "linear_attention/op/arguments.h"

namespace vitkernels {
namespace {

template <class Params>
void run(const LinearProblem& problem, const Params& params, const Tensor& like) {
  run_kernel(kernel<Params>(), params, problem.batch * problem.kv_heads, 1, like);
}

void linear_attention_quadratic(Call& call) {
  const LinearArguments args(call, false, read_host_integers);
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  run(args.problem, LinearQuadraticParams{.problem = args.problem, .out = token_tensor(out)}, args.query);
  call.give(out, "");
}

void linear_attention_quadratic_backward(Call& call) {
  const Tensor given = call.take<Tensor>("grad_out");
  const LinearArguments args(call, false, read_host_integers);
  call.checker.tensor("grad_out", given, args.query, args.query.scalar_type(), args.out_sizes());
  const Tensor grad_out = with_unit_last_stride(given);
  const Tensor grad_query = empty_as(args.query), grad_key = empty_as(args.key), grad_value = empty_as(args.value);
  run(args.problem,
      LinearQuadraticGradParams{.problem = args.problem,
                                .grad_out = token_tensor(grad_out),
                                .grad_query = token_tensor(grad_query),
                                .grad_key = token_tensor(grad_key),
                                .grad_value = token_tensor(grad_value)},
      args.query);
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("linear_attention_quadratic", &boxed<"linear_attention_quadratic", linear_attention_quadratic>);
  m.impl("linear_attention_quadratic_backward",
         &boxed<"linear_attention_quadratic_backward", linear_attention_quadratic_backward>);
}
