// The operators vitkernels::attention and vitkernels::attention_varlen on a GPU, and their backward operators.
#include "attention/cuda/backward_path.h"
#include "attention/op/offset_launches_cuda.h"

namespace vitkernels {
namespace {

// Replaces the additive terms of a score by their sum, where that makes the kernels faster. Owns the sum.
OptionalTensor expand_bias(const Checker& checker, const Tensor& query, Problem& problem, DenseBias bias,
                           cudaStream_t stream) {
  if (bias.pitch == 0) return {};
  const Tensor sum = empty_as(query, {bias.num_elements(problem)}, ScalarType::Float);
  bias.data = static_cast<float*>(sum.mutable_data_ptr());
  check_cuda(checker, launch_expand_bias(problem, bias, stream));
  const OffsetGrid grid = problem.score.by_offset.grid;
  problem.score.bias = problem.score.key_bias = {}, problem.score.by_offset = {};
  problem.score.by_offset.grid = grid;  // for what reaches the queries through relative logits
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

// Memory for what the fast paths need of each query.
Tensor statistics_of(const Tensor& query, AttentionBackwardCudaParams& params) {
  constexpr int64_t kFloats = sizeof(StatisticsOfPair) / sizeof(float);
  const Problem& problem = params.forward.problem;
  const Tensor statistics =
      empty_as(query, {problem.batch, problem.heads, QueryStatistics::pitch(problem) / 2, kFloats}, ScalarType::Float);
  params.statistics.data = static_cast<StatisticsOfPair*>(statistics.mutable_data_ptr());
  return statistics;
}

// Memory for the gradient of the logits, which spares the additive terms a pass of their own; none, if it is too much.
OptionalTensor logit_grads_of(const Tensor& query, AttentionBackwardCudaParams& params) {
  const int64_t elements = LogitGrads::num_elements(params.forward.problem);
  if (elements > kMaxLogitGrads) return {};
  const Tensor grads = empty_as(query, {elements}, query.scalar_type());
  params.logit_grads.data = grads.mutable_data_ptr();
  return grads;
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
  OptionalTensor relative_logits, bias, statistics, logit_grads;
  if (!launches.is_empty()) {
    relative_logits = launch_relative_logits(call.checker, args, params.forward, launches.stream());
  }
  const DeviceOffsetGradients by_offset(launches, args, from.needed, params);
  // Of the kernels that sum for tokens. Those of the terms read the terms as they are.
  AttentionBackwardCudaParams of_tokens = params;
  BackwardPath path = BackwardPath::kGeneral;
  if (!launches.is_empty()) {
    bias = expand_bias(call.checker, args.query, of_tokens.forward.problem, wanted_bias(params), launches.stream());
    path = backward_path(of_tokens);
    const bool is_fast = path != BackwardPath::kGeneral;
    if (is_fast) statistics = statistics_of(args.query, of_tokens);
    const bool needs_logit_grads = from.needed.bias || from.needed.key_bias || from.needed.bias_table ||
                                   params.forward.problem.score.by_offset.has_rel_pos();
    if (is_fast && needs_logit_grads) logit_grads = logit_grads_of(args.query, of_tokens);
    params.logit_grads = of_tokens.logit_grads;
    launches.check(launch_attention_backward_delta(of_tokens, launches.stream()));
  }
  ScoreFields<OptionalTensor> terms;
  if (path == BackwardPath::kResident) {
    launches.sum_both(of_tokens, query, key, value);
  } else {
    launches.sum(of_tokens, Side::kKeys, &key, &value);
    by_offset.sum_relative(params);
    terms.head_scale = launches.sum_queries(of_tokens, query);
  }
  launches.sum_terms(params, terms);
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
