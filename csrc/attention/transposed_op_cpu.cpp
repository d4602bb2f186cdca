// The operators vitkernels::attention_transposed and vitkernels::attention_transposed_backward on the CPU. The
// argument without a name is allow_tf32.
#include "attention/logit_gradients.h"
#include "attention/tiles_cpu.h"
#include "cpu/isa.h"

namespace vitkernels {
namespace {

using torch::stable::parallel_for;

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Strides of a tensor broadcast to (batch, query, head).
ScoreStrides weight_strides(const Tensor& t, bool contiguous) {
  int64_t strides[3] = {};
  int64_t running = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    strides[3 - t.dim() + i] = t.size(i) == 1 ? 0 : contiguous ? running : t.stride(i);
    running *= t.size(i);
  }
  return {.batch = strides[0], .head = strides[2], .query = strides[1]};
}

// Owns what Params points to.
struct TransposedArguments {
  // There is a value for each query instead of each key; the key passes for the value that is missing.
  TransposedArguments(const Checker& checker, const Tensor& query, const Tensor& key, const Tensor& value_q,
                      const Tensor& lse_of_rows, const OptionalTensor& query_weight, ScoreArguments score,
                      const OptionalTensor& head_map, bool is_causal)
      : attention(checker, query, key, key, std::move(score), head_map, is_causal), query_weight(query_weight) {
    const std::vector<int64_t> rows = attention.lse_sizes();
    const ScalarType statistics = statistics_type(attention.dtype);
    checker.rank("value_q", value_q, 4, "(B, Nq, heads, dv)");
    checker.strided_like("value_q", value_q, query);
    checker.dtype("value_q", value_q, query.scalar_type());
    checker.size("value_q", value_q, 0, rows[0], "query's batch size");
    checker.size("value_q", value_q, 1, rows[1], "query's number of tokens");
    checker.size("value_q", value_q, 2, rows[2], "query's number of heads");
    checker.check(value_q.size(3) > 0, "value_q has head dimension 0, takes at least 1");
    checker.strided_like("lse", lse_of_rows, query);
    checker.dtype("lse", lse_of_rows, statistics);
    checker.shape("lse", lse_of_rows, rows);
    check_score_term(checker, "query_weight", query_weight, query, statistics, rows, "(B, Nq, heads)");
    value = with_unit_last_stride(value_q);
    lse = torch::stable::contiguous(lse_of_rows);
  }

  void fill(AttentionTransposedParams& params) const {
    attention.fill(params);
    params.value = token_tensor(value);
    params.value_dim = value.size(3);
    params.lse = const_cast<void*>(lse.const_data_ptr());
    if (!query_weight) return;
    params.query_weight = query_weight->const_data_ptr();
    params.weight_strides = weight_strides(*query_weight, false);
  }

  std::vector<int64_t> out_sizes() const {
    return {attention.batch, attention.num_keys, attention.heads, value.size(3)};
  }

  AttentionArguments attention;
  Tensor value, lse;
  OptionalTensor query_weight;
};

Tensor attention_transposed_cpu(const Tensor& query, const Tensor& key, const Tensor& value_q, const Tensor& lse,
                                OptionalTensor query_weight, double scale, OptionalTensor head_scale,
                                OptionalTensor bias, OptionalTensor key_bias, OptionalTensor multiplier,
                                OptionalTensor head_map, bool is_causal, bool) {
  const TransposedArguments args(Checker("attention_transposed"), query, key, value_q, lse, query_weight,
                                 {scale, head_scale, bias, key_bias, multiplier}, head_map, is_causal);
  Tensor out = empty_as(query, args.out_sizes(), query.scalar_type());
  if (out.numel() == 0) return out;
  AttentionTransposedParams params;
  args.fill(params);
  params.out = token_tensor(out);
  const Kernels& kernels = vitkernels::kernels();
  const int64_t tasks = params.batch * params.heads * transposed_keys(params).count;
  const ThreadScratch scratch(query, kernels.attention_transposed_scratch(params), tasks);
  parallel_for(0, tasks, 1,
               [&](int64_t begin, int64_t end) { kernels.attention_transposed(params, begin, end, scratch.mine()); });
  return out;
}

// d(query_weight) in its own shape from that of each row [B, Nq, heads], in double and in order.
Tensor sum_query_weight(const Tensor& weight, const Tensor& of_rows) {
  Tensor grad = zeros_as(weight, sizes_of(weight), ScalarType::Double);
  if (of_rows.numel() == 0) return torch::stable::to(grad, weight.scalar_type());
  const ScoreStrides strides = weight_strides(weight, true);
  double* sums = static_cast<double*>(grad.mutable_data_ptr());
  const auto sum = [&]<class T>(T) {
    const T* row = static_cast<const T*>(of_rows.const_data_ptr());
    for (int64_t b = 0; b < of_rows.size(0); ++b) {
      for (int64_t query = 0; query < of_rows.size(1); ++query) {
        for (int64_t h = 0; h < of_rows.size(2); ++h) sums[strides.offset(b, h, query, 0)] += *row++;
      }
    }
  };
  if (of_rows.scalar_type() == ScalarType::Double) {
    sum(double{});
  } else {
    sum(float{});
  }
  return torch::stable::to(grad, weight.scalar_type());
}

Backward attention_transposed_backward_cpu(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                           const Tensor& value_q, const Tensor& lse, OptionalTensor query_weight,
                                           double scale, OptionalTensor head_scale, OptionalTensor bias,
                                           OptionalTensor key_bias, OptionalTensor multiplier, OptionalTensor head_map,
                                           bool is_causal, bool, bool need_query_weight, bool need_head_scale,
                                           bool need_bias, bool need_key_bias, bool need_multiplier) {
  const Checker checker("attention_transposed_backward");
  const TransposedArguments args(checker, query, key, value_q, lse, query_weight,
                                 {scale, head_scale, bias, key_bias, multiplier}, head_map, is_causal);
  checker.strided_like("grad_out", grad_out, query);
  checker.dtype("grad_out", grad_out, query.scalar_type());
  checker.shape("grad_out", grad_out, args.out_sizes());
  const Tensor out_gradient = with_unit_last_stride(grad_out);

  const Tensor grad_value = empty_as(value_q, sizes_of(value_q), value_q.scalar_type());
  const Tensor grad_lse = empty_as(lse, sizes_of(lse), lse.scalar_type());
  const Tensor grad_row_weight = empty_as(lse, sizes_of(lse), lse.scalar_type());
  AttentionTransposedParams params;
  args.fill(params);
  params.grad_out = token_tensor(out_gradient);
  params.grad_value = token_tensor(grad_value);
  params.grad_row_lse = grad_lse.mutable_data_ptr();
  params.grad_row_weight = grad_row_weight.mutable_data_ptr();
  LogitGradients grads(args.attention, {need_head_scale, need_bias, need_key_bias, need_multiplier}, params);
  const Kernels& kernels = vitkernels::kernels();
  const int64_t part_elements = kernels.attention_transposed_backward_parts(params) / int64_t(lse.element_size());
  const Tensor value_parts = zeros_as(lse, {part_elements}, lse.scalar_type());
  params.grad_value_parts = value_parts.mutable_data_ptr();

  // An empty tensor may claim any batch size.
  const bool is_empty = query.numel() == 0 && key.numel() == 0;
  if (params.num_tasks() > 0 && !is_empty) {
    const ThreadScratch scratch(query, kernels.attention_transposed_backward_scratch(params), params.num_tasks());
    parallel_for(0, params.num_tasks(), 1, [&](int64_t begin, int64_t end) {
      kernels.attention_transposed_backward(params, begin, end, scratch.mine());
    });
  }
  if (query.numel() > 0) {
    parallel_for(0, params.batch * params.heads, 1,
                 [&](int64_t begin, int64_t end) { kernels.finish_value_gradient(params, begin, end); });
  }
  grads.finish(args.attention, params);
  const Tensor grad_weight = need_query_weight && args.query_weight
                                 ? sum_query_weight(*args.query_weight, grad_row_weight)
                                 : empty_as(lse, {0}, lse.scalar_type());
  return {grads.query,      grads.key,  grad_value,     grad_lse,        grad_weight,
          grads.head_scale, grads.bias, grads.key_bias, grads.multiplier};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention_transposed", TORCH_BOX(&vitkernels::attention_transposed_cpu));
  m.impl("attention_transposed_backward", TORCH_BOX(&vitkernels::attention_transposed_backward_cpu));
}
