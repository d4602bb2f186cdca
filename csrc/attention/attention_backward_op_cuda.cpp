// The operator vitkernels::attention_backward on a GPU.
#include "attention/arguments_cuda.h"
#include "attention/backward_arguments.h"
#include "attention/grid_launches_cuda.h"
#include "attention/sums_in_parts_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients that are all zero where there is nothing to sum.
class Gradients {
 public:
  Gradients(const Checker& checker, const AttentionArguments& args, const BackwardArguments& from, bool allow_tf32)
      : checker_(checker),
        args_(args),
        is_empty_(from.lse.numel() == 0 || args.key.numel() == 0),
        grad_out_(with_unit_last_stride(from.grad_out)),
        out_(with_unit_last_stride(from.out)),
        lse_(torch::stable::contiguous(from.lse)),
        delta_(empty_as(args.query, args.lse_sizes(), ScalarType::Float)),
        query_(like(args.query)),
        key_(like(args.key)),
        value_(like(args.value)) {
    fill_on_device(args, out_, lse_, params_);
    params_.allow_tf32 = allow_tf32;
    if (from.grad_lse) grad_lse_ = torch::stable::contiguous(*from.grad_lse);
    params_.grad_lse = grad_lse_ ? static_cast<const float*>(grad_lse_->const_data_ptr()) : nullptr;
    params_.delta = static_cast<float*>(delta_.mutable_data_ptr());
    params_.grad_out = token_tensor(grad_out_);
    params_.grad_query = token_tensor(query_);
    params_.grad_key = token_tensor(key_);
    params_.grad_value = token_tensor(value_);
  }

  Backward compute(NeededGradients needed) {
    std::optional<OnDevice> device;
    OptionalTensor relative;
    std::optional<GridGradientsOnDevice> grid_gradients;
    if (!is_empty_) {
      device.emplace(args_.query);
      relative = launch_relative_logits(checker_, args_, params_, device->stream());
      check_cuda(checker_, launch_attention_backward_delta(params_, device->stream()));
      grid_gradients.emplace(checker_, args_, needed.on_grid, params_, device->stream());
      check_cuda(checker_, launch_attention_backward_keys(params_, device->stream()));
      check_cuda(checker_, launch_attention_backward_queries(params_, device->stream()));
    }
    const ScoreArguments& score = args_.score;
    const auto strides = [](const OptionalTensor& t, int64_t rank) {
      return t ? score_strides(*t, rank, true) : ScoreStrides{};
    };
    const auto on_grid = grid_gradients ? grid_gradients->compute(params_) : zeros_on_grid(needed.on_grid);
    return {query_,
            key_,
            value_,
            term(score.head_scale, needed.head_scale, TermFactor::kHeadScale, {.head = 1}, device),
            term(score.bias, needed.bias, TermFactor::kBias, strides(score.bias, 4), device),
            term(score.key_bias, needed.key_bias, TermFactor::kBias, strides(score.key_bias, 3), device),
            term(score.multiplier, needed.multiplier, TermFactor::kMultiplier, strides(score.multiplier, 4), device),
            on_grid[0],
            on_grid[1],
            on_grid[2],
            on_grid[3],
            on_grid[4]};
  }

 private:
  // A new one each: outputs must not alias.
  Tensor none() const { return empty_as(args_.query, {0}, ScalarType::Float); }

  Tensor like(const Tensor& t) const {
    return is_empty_ ? zeros_as(t, sizes_of(t), t.scalar_type()) : empty_as(t, sizes_of(t), t.scalar_type());
  }

  Tensor term(const OptionalTensor& tensor, bool is_needed, TermFactor factor, ScoreStrides strides,
              const std::optional<OnDevice>& device) const {
    if (!tensor || !is_needed) return none();
    if (is_empty_) return like(*tensor);
    const SumsInParts sums(*tensor, parts_of_term(params_, strides, tensor->numel()), tensor->numel(),
                           SumsInParts::Start::kAnything);
    check_cuda(checker_, launch_attention_backward_term(params_, {factor, strides, sums.sums()}, device->stream()));
    check_cuda(checker_, sums.add(device->stream()));
    return sums.gradient();
  }

  std::array<Tensor, 5> zeros_on_grid(const WantedOnGrid& wanted) const {
    const GridArguments& from = args_.on_grid.from;
    const OptionalTensor* given[] = {&from.bias_table, &from.multiplier_table, &from.rel_pos[0], &from.rel_pos[1],
                                     &from.rel_pos[2]};
    std::array<Tensor, 5> grads;
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = *given[i] && wanted[i] ? like(**given[i]) : none();
    return grads;
  }

  const Checker& checker_;
  const AttentionArguments& args_;
  bool is_empty_;
  Tensor grad_out_, out_, lse_, delta_;
  OptionalTensor grad_lse_;
  Tensor query_, key_, value_;
  AttentionBackwardCudaParams params_;
};

Backward attention_backward_cuda(const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& query,
                                 const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                                 double scale, OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                 OptionalTensor multiplier, OptionalTensor bias_table, OptionalTensor multiplier_table,
                                 OptionalTensor rel_pos_depth, OptionalTensor rel_pos_height,
                                 OptionalTensor rel_pos_width, int64_t num_prefix_tokens, OptionalTensor head_map,
                                 bool is_causal, bool allow_tf32, bool need_head_scale, bool need_bias,
                                 bool need_key_bias, bool need_multiplier, bool need_bias_table,
                                 bool need_multiplier_table, bool need_rel_pos_depth, bool need_rel_pos_height,
                                 bool need_rel_pos_width) {
  const Checker checker("attention_backward");
  const GridArguments on_grid{
      bias_table, multiplier_table, {rel_pos_depth, rel_pos_height, rel_pos_width}, num_prefix_tokens};
  const AttentionArguments args = arguments_on_device(
      checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier, on_grid}, head_map, is_causal);
  checker.check(args.value_dim <= kMaxCudaHeadDim, "value has head dimension ", args.value_dim, ", takes at most ",
                kMaxCudaHeadDim, " on a GPU");
  const BackwardArguments from{
      grad_out,
      grad_lse,
      out,
      lse,
      {need_head_scale,
       need_bias,
       need_key_bias,
       need_multiplier,
       {need_bias_table, need_multiplier_table, need_rel_pos_depth, need_rel_pos_height, need_rel_pos_width}}};
  from.check(checker, args);
  return Gradients(checker, args, from, allow_tf32).compute(from.needed);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("attention_backward", TORCH_BOX(&vitkernels::attention_backward_cuda));
}
