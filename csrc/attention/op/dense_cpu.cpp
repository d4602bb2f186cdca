// The operators vitkernels::attention and vitkernels::attention_varlen on the CPU, and their backward operators.
#include "attention/op/logit_gradients.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

template <bool kIsPacked>
void attention(Call& call) {
  const AttentionArguments args(call.checker, take_dense(call, kIsPacked));
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), statistics_type(args.dtype));
  AttentionParams params;
  args.fill(params);
  params.out = token_tensor(out);
  params.lse = lse.mutable_data_ptr();

  if (args.num_tasks > 0) {
    const int64_t of_head = params.packing ? 1 : args.num_tasks / (args.batch * args.heads);
    run_kernel(kernel<AttentionParams>(), params, args.num_tasks, of_head, args.query);
  }
  call.give(out, "out");
  call.give(lse, "lse");
}

template <bool kIsPacked>
void attention_backward(Call& call) {
  DenseCall forward = take_dense(call, kIsPacked);
  BackwardCall from(call, forward.score);
  const AttentionArguments args(call.checker, std::move(forward));
  from.check(call.checker, args.query, args.out_sizes());
  const Tensor grad_value = empty_as(args.value);

  AttentionBackwardParams params;
  args.fill(params.forward);
  params.forward.out = token_tensor(from.out);
  params.grad_out = token_tensor(from.grad_out);
  params.forward.lse = const_cast<void*>(from.lse.const_data_ptr());
  params.grad_lse = from.grad_lse ? from.grad_lse->const_data_ptr() : nullptr;
  params.grad_value = token_tensor(grad_value);
  LogitGradients grads(args, from.needed, params, true);

  // An empty tensor may have any batch size, however large.
  const bool is_empty = args.query.numel() == 0 && args.key.numel() == 0;
  if (params.num_tasks() > 0 && !is_empty) {
    run_kernel(kernel<AttentionBackwardParams>(), params, params.num_tasks(), 1, args.query);
  }
  grads.finish(args, params);
  call.give(grads.query, "grad_query");
  call.give(grads.key, "grad_key");
  call.give(grad_value, "grad_value");
  give_gradients(call, grads.terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("attention", &boxed<"attention", attention<false>>);
  m.impl("attention_backward", &boxed<"attention_backward", attention_backward<false>>);
  m.impl("attention_varlen", &boxed<"attention_varlen", attention<true>>);
  m.impl("attention_varlen_backward", &boxed<"attention_varlen_backward", attention_backward<true>>);
}
