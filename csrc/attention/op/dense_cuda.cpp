// The operators vitkernels::attention and vitkernels::attention_varlen on a GPU, and their backward operators.
#include "attention/cuda/forward_path.h"
#include "attention/op/offset_launches_cuda.h"

namespace vitkernels {
namespace {

// Replaces the additive terms of a score by their sum, where that makes the forward faster. Owns the sum.
OptionalTensor expand_bias(const Checker& checker, const Tensor& query, Problem& problem, DenseBias bias,
                           cudaStream_t stream) {
  if (bias.pitch == 0) return {};
  const Tensor sum = empty_as(query, {bias.num_elements(problem)}, ScalarType::Float);
  bias.data = static_cast<float*>(sum.mutable_data_ptr());
  check_cuda(checker, launch_expand_bias(problem, bias, stream));
  problem.score.bias = problem.score.key_bias = {}, problem.score.by_offset = {};
  problem.score.bias.data = bias.data;
  problem.score.bias.strides = bias.strides(problem);
  return sum;
}

void run_forward(const Checker& checker, const AttentionArguments& args, const Tensor& out, const Tensor& lse) {
  AttentionCudaParams params;
  fill_on_device(args, out, lse, params);
  const OnDevice device(args.query);
  const OptionalTensor relative = launch_relative_logits(checker, args, params, device.stream());
  const OptionalTensor bias = expand_bias(checker, args.query, params.problem, wanted_bias(params), device.stream());
  params.splits = attention_key_splits(params);
  OptionalTensor split_out, split_max, split_sum;
  if (params.splits > 1) {
    split_out = empty_as(args.query, {params.splits, out.numel()}, ScalarType::Float);
    split_max = empty_as(args.query, {params.splits, lse.numel()}, ScalarType::Float);
    split_sum = empty_as(args.query, {params.splits, lse.numel()}, ScalarType::Float);
    params.split_out = static_cast<float*>(split_out->mutable_data_ptr());
    params.split_max = static_cast<float*>(split_max->mutable_data_ptr());
    params.split_sum = static_cast<float*>(split_sum->mutable_data_ptr());
  }
  check_cuda(checker, launch_attention(params, device.stream()));
}

template <bool kIsPacked>
void attention(Call& call) {
  const AttentionArguments args(call.checker, take_dense(call, kIsPacked), device_policy());
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);
  if (lse.numel() > 0) run_forward(call.checker, args, out, lse);
  call.give(out, "out");
  call.give(lse, "lse");
}

template <bool kIsPacked>
void attention_backward(Call& call) {
  DenseCall forward = take_dense(call, kIsPacked);
  BackwardCall from(call, forward.score);
  const AttentionArguments args(call.checker, std::move(forward), device_policy());
  from.check(call.checker, args.query, args.out_sizes());
  const BackwardLaunches launches(call.checker, args, from.needed);
  const Tensor delta = launches.gradient_of(from.lse);
  const Tensor query = launches.gradient_of(args.query), key = launches.gradient_of(args.key);
  const Tensor value = launches.gradient_of(args.value);

  AttentionBackwardCudaParams params;
  fill_on_device(args, from.out, from.lse, params.forward);
  params.query_value = token_tensor(from.grad_out);
  params.key_value = params.forward.problem.value;
  params.grad_lse = from.grad_lse ? static_cast<const float*>(from.grad_lse->const_data_ptr()) : nullptr;
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  OptionalTensor relative_logits;
  if (!launches.is_empty()) {
    relative_logits = launch_relative_logits(call.checker, args, params.forward, launches.stream());
    launches.check(launch_attention_backward_delta(params, launches.stream()));
  }
  const DeviceOffsetGradients by_offset(launches, args, from.needed, params);
  launches.sum(params, Side::kKeys, &key, &value);
  ScoreFields<OptionalTensor> terms = launches.sum_queries(params, query);
  by_offset.compute(params, terms);
  call.give(query, "grad_query");
  call.give(key, "grad_key");
  call.give(value, "grad_value");
  give_gradients(call, terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("attention", &boxed<"attention", attention<false>>);
  m.impl("attention_backward", &boxed<"attention_backward", attention_backward<false>>);
  m.impl("attention_varlen", &boxed<"attention_varlen", attention<true>>);
  m.impl("attention_varlen_backward", &boxed<"attention_varlen_backward", attention_backward<true>>);
}
