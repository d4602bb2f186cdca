// The operators vitkernels::attention and vitkernels::attention_varlen on the CPU, and their backward operators.
#include "attention/arguments.h"
#include "attention/tiles_cpu.h"
#include "cpu/isa.h"

namespace vitkernels {
namespace {

using torch::stable::parallel_for;

using Forward = std::tuple<Tensor, Tensor>;
// Of query, key, value and the score terms, in the order of the arguments.
using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using VarlenBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward run_forward(const AttentionArguments& args) {
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), statistics_type(args.dtype));
  AttentionParams params;
  args.fill(params);
  params.out = token_tensor(out);
  params.lse = lse.mutable_data_ptr();

  const Kernels& kernels = vitkernels::kernels();
  if (args.num_tasks > 0) {
    const ThreadScratch scratch(args.query, kernels.attention_scratch(params), args.num_tasks);
    parallel_for(0, args.num_tasks, 1,
                 [&](int64_t begin, int64_t end) { kernels.attention(params, begin, end, scratch.mine()); });
  }
  return {out, lse};
}

// d(head_scale)[h] = scale * sum of q.dq over all queries, in double and in order.
Tensor sum_head_scale(const AttentionArguments& args, const Tensor& query_dot) {
  Tensor grad = empty_as(query_dot, {args.heads}, query_dot.scalar_type());
  const auto sum = [&]<class T>(T) {
    const T* dots = static_cast<const T*>(query_dot.const_data_ptr());  // [heads, rows]
    for (int64_t h = 0; h < args.heads; ++h) {
      double total = 0;
      for (int64_t i = 0; i < query_dot.size(1); ++i) total += *dots++;
      static_cast<T*>(grad.mutable_data_ptr())[h] = T(args.score.scale * total);
    }
  };
  if (args.dtype == DType::kFloat64) {
    sum(double{});
  } else {
    sum(float{});
  }
  return grad;
}

struct WantedTerm {
  ScoreTerm& term;
  const OptionalTensor& tensor;
  bool wanted;
  int64_t rank;
};

// Gradients of the score terms, and what they mean for how the work is cut.
std::vector<Tensor> attach_score_gradients(AttentionBackwardParams& params, const std::vector<WantedTerm>& terms,
                                           const Tensor& like) {
  std::vector<Tensor> grads;
  for (const WantedTerm& t : terms) {
    if (!t.wanted || !t.tensor) {
      grads.push_back(empty_as(like, {0}, like.scalar_type()));
      continue;
    }
    grads.push_back(attach_gradient(t.term, *t.tensor, t.rank, params));
    params.batch_is_shared |= t.term.grad_strides.batch == 0 && params.batch > 1;
    params.heads_are_shared |= t.term.grad_strides.head == 0 && params.heads > 1;
    // One value for all keys: the splits would write to the same place.
    if (t.term.grad_strides.key == 0) params.splits = 1;
  }
  return grads;
}

// What the backward gets besides the forward's arguments.
struct BackwardArguments {
  const Tensor& grad_out;
  OptionalTensor grad_lse;
  const Tensor& out;
  const Tensor& lse;
  bool need_head_scale, need_bias, need_key_bias, need_multiplier;
  WantedOnGrid need_on_grid = {};

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

Backward run_backward(const AttentionArguments& args, const BackwardArguments& from) {
  const ScalarType type = args.query.scalar_type(), statistics = statistics_type(args.dtype);
  const Tensor grad_out = with_unit_last_stride(from.grad_out), out = with_unit_last_stride(from.out);
  const Tensor lse = torch::stable::contiguous(from.lse);
  OptionalTensor grad_lse;
  if (from.grad_lse) grad_lse = torch::stable::contiguous(*from.grad_lse);
  Tensor grad_query = empty_as(args.query, sizes_of(args.query), type);
  Tensor grad_key = empty_as(args.key, sizes_of(args.key), type);
  Tensor grad_value = empty_as(args.value, sizes_of(args.value), type);
  const auto none = [&] { return empty_as(lse, {0}, statistics); };  // a new one each: outputs must not alias

  AttentionBackwardParams params;
  args.fill(params);
  params.out = token_tensor(out);
  params.grad_out = token_tensor(grad_out);
  params.lse = const_cast<void*>(lse.const_data_ptr());
  params.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  params.grad_query = token_tensor(grad_query);
  params.grad_key = token_tensor(grad_key);
  params.grad_value = token_tensor(grad_value);
  params.splits = 0;
  std::vector<Tensor> score_grads =
      attach_score_gradients(params,
                             {{params.score.bias, args.score.bias, from.need_bias, 4},
                              {params.score.key_bias, args.score.key_bias, from.need_key_bias, 3},
                              {params.score.multiplier, args.score.multiplier, from.need_multiplier, 4}},
                             lse);
  GridGradients grid_gradients(args.on_grid, from.need_on_grid, params);
  if (params.splits == 0) params.splits = backward_splits(params);
  grid_gradients.allocate(params, lse);

  const Kernels& kernels = vitkernels::kernels();
  const bool want_head_scale = from.need_head_scale && args.score.head_scale;
  const int64_t part_elements = kernels.attention_backward_parts(params) / int64_t(lse.element_size());
  const Tensor parts = zeros_as(lse, {part_elements}, statistics);
  const Tensor query_dot = want_head_scale ? empty_as(lse, {args.heads, params.num_rows()}, statistics) : none();
  const bool has_rel_pos = params.score.on_grid.has_rel_pos();
  const Tensor rel_parts = zeros_as(lse, {has_rel_pos ? part_elements : 0}, statistics);
  params.grad_query_parts = parts.mutable_data_ptr();
  params.grad_rel_query_parts = has_rel_pos ? rel_parts.mutable_data_ptr() : nullptr;
  params.query_dot = want_head_scale ? query_dot.mutable_data_ptr() : nullptr;

  // An empty tensor may claim any batch size.
  const bool is_empty = args.query.numel() == 0 && args.key.numel() == 0;
  if (params.num_tasks() > 0 && !is_empty) {
    const ThreadScratch scratch(args.query, kernels.attention_backward_scratch(params), params.num_tasks());
    parallel_for(0, params.num_tasks(), 1,
                 [&](int64_t begin, int64_t end) { kernels.attention_backward(params, begin, end, scratch.mine()); });
  }
  if (args.query.numel() > 0) {
    parallel_for(0, args.batch * args.heads, 1,
                 [&](int64_t begin, int64_t end) { kernels.finish_query_gradient(params, begin, end); });
  }
  for (Tensor& grad : score_grads) grad = torch::stable::to(grad, statistics);
  const Tensor grad_head_scale = want_head_scale ? sum_head_scale(args, query_dot) : none();
  const std::vector<Tensor> on_grid = grid_gradients.finish(params, lse);
  return {grad_query,     grad_key,   grad_value, grad_head_scale, score_grads[0], score_grads[1],
          score_grads[2], on_grid[0], on_grid[1], on_grid[2],      on_grid[3],     on_grid[4]};
}

Forward attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                      OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                      OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                      OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height, OptionalTensor rel_pos_width,
                      int64_t num_prefix_tokens, OptionalTensor head_map, bool is_causal) {
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  return run_forward({Checker("attention"),
                      query,
                      key,
                      value,
                      {scale, head_scale, bias, key_bias, multiplier, on_grid},
                      head_map,
                      is_causal});
}

Backward attention_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query, const Tensor& key,
                                const Tensor& value, const Tensor& out, const Tensor& lse, double scale,
                                OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                                OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height,
                                OptionalTensor rel_pos_width, int64_t num_prefix_tokens, OptionalTensor head_map,
                                bool is_causal, bool need_head_scale, bool need_bias, bool need_key_bias,
                                bool need_multiplier, bool need_bias_table, bool need_multiplier_table,
                                bool need_rel_pos_depth, bool need_rel_pos_height, bool need_rel_pos_width) {
  const Checker checker("attention_backward");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  const AttentionArguments args(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier, on_grid},
                                head_map, is_causal);
  const BackwardArguments from{
      grad_out,
      grad_lse,
      out,
      lse,
      need_head_scale,
      need_bias,
      need_key_bias,
      need_multiplier,
      {need_bias_table, need_multiplier_table, need_rel_pos_depth, need_rel_pos_height, need_rel_pos_width}};
  from.check(checker, args);
  return run_backward(args, from);
}

Forward attention_varlen_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                             OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                             OptionalTensor multiplier, OptionalTensor head_map, bool is_causal) {
  return run_forward({Checker("attention_varlen"),
                      query,
                      key,
                      value,
                      {scale, head_scale, bias, key_bias, multiplier},
                      head_map,
                      is_causal,
                      Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}});
}

// Packed sequences have no grid.
template <std::size_t... kIndex>
VarlenBackward first_of(const Backward& grads, std::index_sequence<kIndex...>) {
  return {std::get<kIndex>(grads)...};
}

VarlenBackward attention_varlen_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query,
                                             const Tensor& key, const Tensor& value, const Tensor& out,
                                             const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                             OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                             OptionalTensor multiplier, OptionalTensor head_map, bool is_causal,
                                             bool need_head_scale, bool need_bias, bool need_key_bias,
                                             bool need_multiplier) {
  const Checker checker("attention_varlen_backward");
  const AttentionArguments args(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                                is_causal, Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k});
  const BackwardArguments from{grad_out,        grad_lse,  out,           lse,
                               need_head_scale, need_bias, need_key_bias, need_multiplier};
  from.check(checker, args);
  const Backward grads = run_backward(args, from);
  return first_of(grads, std::make_index_sequence<std::tuple_size_v<VarlenBackward>>());
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&vitkernels::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vitkernels::attention_backward_cpu));
  m.impl("attention_varlen", TORCH_BOX(&vitkernels::attention_varlen_cpu));
  m.impl("attention_varlen_backward", TORCH_BOX(&vitkernels::attention_varlen_backward_cpu));
}
