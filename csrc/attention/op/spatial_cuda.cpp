// The operators vitkernels::spatial_attention and vitkernels::spatial_attention_backward on a GPU: small windows, which
// have kernels of their own, and everything else.
#include "attention/cuda/windows.h"
#include "attention/op/arguments_cuda.h"
#include "attention/op/partial_sums_cuda.h"
#include "attention/op/spatial_backward_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

using WindowAxes = std::array<WindowAxis, kMaxAxes>;

// The windows of an axis. A window of no tokens: the rule is another, or windows do not divide the axis.
WindowAxis window_axis(const AxisRule& rule) {
  const int64_t tokens = rule.num_keys, of_class = tokens / rule.step;
  const bool is_block = rule.rule == Rule::kBlock && rule.halo == 0 && rule.key_size == rule.size;
  const bool is_full = rule.rule == Rule::kFull || (is_block && rule.shift == 0 && rule.size > of_class);
  const int64_t size = is_full ? of_class : rule.size;
  const bool is_divided = tokens == rule.num_queries && tokens % (rule.step * size) == 0 && size <= kMaxWindowTokens;
  if ((!is_full && !is_block) || rule.is_causal || !is_divided) return {.size = 0};
  return {.tokens = int(tokens), .size = int(size), .shift = is_full ? 0 : int(rule.shift), .step = int(rule.step)};
}

WindowAxes window_axes(const SpatialPattern& pattern) {
  WindowAxes axes;
  for (int axis = 0; axis < kMaxAxes; ++axis) axes[axis] = window_axis(pattern.axis[axis]);
  return axes;
}

// Whether rows, or a copy of them, begin at multiples of 16 bytes: what is contiguous already is not copied.
bool can_be_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 || !t.is_contiguous();
}

// Whether the kernels of small windows take a call.
bool are_small_windows(const SpatialArguments& args, const WindowAxes& axes) {
  const ScoreFields<OptionalTensor>& terms = args.score.terms;
  const auto has = [](const auto& term) { return term.has_value(); };
  int64_t slots = 1;
  double tokens = double(args.batch);
  for (const WindowAxis& axis : axes) slots *= axis.size, tokens *= axis.tokens;
  const bool fits = slots > 0 && slots <= kMaxWindowTokens && tokens <= std::numeric_limits<int32_t>::max() &&
                    std::max(args.head_dim, args.value_dim) <= 64 && args.head_dim % 8 == 0 && args.value_dim % 8 == 0;
  const bool is_plain = !args.is_shared_query && !args.score.has_outside && args.pattern.radius == 0.0 &&
                        !args.score.head_map && !terms.key_bias && !terms.multiplier_table &&
                        std::none_of(terms.rel_pos.begin(), terms.rel_pos.end(), has);
  // The backward has other kernels for groups of heads. Forward and backward must round the same unit vectors.
  const bool has_units_of_backward = !args.qk_norm || args.kv_heads == args.heads;
  // They look up all pairs of a window: a shift may leave offsets without a pair that is seen, and tables without them.
  bool has_entries = true;
  for (int axis = 0; terms.bias_table && axis < args.axes; ++axis) {
    has_entries = has_entries && terms.bias_table->size(1 + axis) >= 2 * axes[kMaxAxes - args.axes + axis].size - 1;
  }
  const bool are_aligned = can_be_aligned(args.query) && can_be_aligned(args.key) && can_be_aligned(args.value);
  return args.dtype != DType::kFloat32 && has_entries && are_aligned && fits && is_plain && has_units_of_backward &&
         args.score.scale > kMinWindowScale && args.score.scale < kMaxWindowScale;
}

// The map's tokens, row by row: one distance from each to the next.
TokenTensor token_rows(const Tensor& t, int axes) {
  const MapTensor map = map_tensor(t, axes);
  TokenTensor rows{map.data, map.batch_stride, 0, map.head_stride, false};
  bool is_aligned =
      reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.batch_stride % 8 == 0 && map.head_stride % 8 == 0;
  bool is_last = true;  // of the axes that have a stride
  int64_t next = 0;
  for (int axis = axes - 1; axis >= 0; --axis) {
    if (t.size(1 + axis) == 1) continue;
    if (is_last) rows.token_stride = t.stride(1 + axis);
    is_aligned = is_aligned && (is_last || t.stride(1 + axis) == next);
    next = t.stride(1 + axis) * t.size(1 + axis);
    is_last = false;
  }
  rows.is_aligned = is_aligned && rows.token_stride % 8 == 0 && rows.token_stride < kMaxWindowStride;
  return rows;
}

Tensor with_token_rows(const Tensor& t, int axes) { return token_rows(t, axes).is_aligned ? t : as_contiguous(t); }

// What the kernels read of a call: its rows, or copies of them where they are not one distance apart.
struct WindowOperands {
  Tensor query, key, value;
  WindowCudaParams params;

  WindowOperands(const SpatialArguments& args, const WindowAxes& axes)
      : query(with_token_rows(args.query, args.axes)),
        key(with_token_rows(args.key, args.axes)),
        value(with_token_rows(args.value, args.axes)) {
    SpatialParams spatial;
    args.fill(spatial);
    params = {.dtype = args.dtype,
              .batch = args.batch,
              .heads = args.heads,
              .kv_heads = args.kv_heads,
              .head_dim = args.head_dim,
              .value_dim = args.value_dim,
              .query = token_rows(query, args.axes),
              .key = token_rows(key, args.axes),
              .value = token_rows(value, args.axes),
              .scale = spatial.score.scale.as<float>(),
              .head_scale = static_cast<const float*>(spatial.score.head_scale),
              .qk_norm = args.qk_norm,
              .table = static_cast<const float*>(spatial.score.by_offset.bias.data),
              .table_head_stride = spatial.score.by_offset.bias.head_stride,
              .grid = spatial.score.by_offset.small};
    std::copy(axes.begin(), axes.end(), params.axis);
  }
};

void launch_units(const Checker& checker, const UnitRowsParams& params, cudaStream_t stream) {
  check_cuda(checker, launch_unit_rows(params, stream));
}

void spatial_attention(Call& call) {
  SpatialCall given = take_spatial(call);
  const bool allow_tf32 = given.allow_tf32;
  SpatialArguments args(call.checker, std::move(given), device_policy());
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);
  if (!args.is_empty()) {
    const OnDevice device(args.query);
    if (const WindowAxes axes = window_axes(args.pattern); are_small_windows(args, axes)) {
      WindowOperands operands(args, axes);
      operands.params.out = token_rows(out, args.axes);
      operands.params.lse = static_cast<float*>(lse.mutable_data_ptr());
      check_cuda(call.checker, launch_window_attention(operands.params, device.stream()));
    } else {
      args.normalize([&](const UnitRowsParams& params) { launch_units(call.checker, params, device.stream()); });
      SpatialCudaParams params = spatial_forward_params(call.checker, args);
      params.allow_tf32 = allow_tf32;
      const OptionalTensor relative = launch_spatial_relative_logits(call.checker, args, params, device.stream());
      params.out = out.mutable_data_ptr();
      params.lse = static_cast<float*>(lse.mutable_data_ptr());
      check_cuda(call.checker, launch_spatial_attention(params, device.stream()));
    }
  }
  call.give(out, "out");
  call.give(lse, "lse");
}

// The gradients of attention in small windows.
void launch_window_backward(const Checker& checker, const SpatialArguments& args, const WindowAxes& axes,
                            const BackwardCall& from, const SpatialGradientTensors& grads) {
  const WindowOperands operands(args, axes);
  const Tensor grad_out = with_token_rows(from.grad_out, args.axes);
  WindowBackwardCudaParams params{.forward = operands.params,
                                  .grad_out = token_rows(grad_out, args.axes),
                                  .grad_query = token_rows(grads.query, args.axes),
                                  .grad_key = token_rows(grads.key, args.axes),
                                  .grad_value = token_rows(grads.value, args.axes)};
  params.forward.lse = const_cast<float*>(static_cast<const float*>(from.lse.const_data_ptr()));
  if (from.grad_lse) params.grad_lse = static_cast<const float*>(from.grad_lse->const_data_ptr());
  const OnDevice device(args.query);
  std::vector<PartialSumsOwner> owners;
  if (const OptionalTensor& table = grads.terms.bias_table) {
    const int64_t offsets = num_table_entries(params.forward.grid);
    owners.emplace_back(*table, window_parts(params.forward), args.heads * offsets, PartialSumsOwner::Start::kZero);
    params.table = owners.back().sums();
  }
  if (const OptionalTensor& scale = grads.terms.head_scale) {
    owners.emplace_back(*scale, window_parts(params.forward), args.heads);
    params.head_scale = owners.back().sums();
  }
  check_cuda(checker, launch_window_attention_backward(params, device.stream()));
  for (const PartialSumsOwner& sums : owners) check_cuda(checker, sums.add(DType::kFloat32, device.stream()));
}

// The gradients of an attention by the kernels that take any pattern.
void launch_general_backward(const Checker& checker, SpatialArguments& args, const BackwardCall& from, bool allow_tf32,
                             const SpatialGradientTensors& grads) {
  const OnDevice device(args.query);
  const Tensor query = args.query, key = args.key;
  args.normalize([&](const UnitRowsParams& params) { launch_units(checker, params, device.stream()); });
  launch_spatial_backward(checker, args, from, allow_tf32, grads);
  if (!args.qk_norm) return;
  const auto differentiate = [&](const Tensor& rows, const Tensor& grad) {
    UnitRowsParams params = unit_rows_params(rows, args.dtype);
    params.grad = grad.mutable_data_ptr();
    launch_units(checker, params, device.stream());
  };
  differentiate(query, grads.query);
  differentiate(key, grads.key);
}

void spatial_attention_backward(Call& call) {
  SpatialCall forward = take_spatial(call);
  const bool allow_tf32 = forward.allow_tf32;
  BackwardCall from(call, forward.score);
  SpatialArguments args(call.checker, std::move(forward), device_policy());
  from.check(call.checker, args.query, args.out_sizes());
  const bool is_empty = args.is_empty();
  const auto gradient_of = [&](const Tensor& t) { return is_empty ? zeros_as(t) : empty_as(t); };
  SpatialGradientTensors grads{gradient_of(args.query), gradient_of(args.key), gradient_of(args.value), {}};
  const auto add = [&](const char*, bool is_needed, const OptionalTensor& term, OptionalTensor& grad) {
    if (is_needed) grad = zeros_as(*term);
  };
  for_each_term(add, from.needed, args.score.terms, grads.terms);
  if (!is_empty) {
    const WindowAxes axes = window_axes(args.pattern);
    if (are_small_windows(args, axes) && args.kv_heads == args.heads && can_be_aligned(from.grad_out)) {
      launch_window_backward(call.checker, args, axes, from, grads);
    } else {
      launch_general_backward(call.checker, args, from, allow_tf32, grads);
    }
  }
  call.give(grads.query, "grad_query");
  call.give(grads.key, "grad_key");
  call.give(grads.value, "grad_value");
  give_gradients(call, grads.terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("spatial_attention", &boxed<"spatial_attention", spatial_attention>);
  m.impl("spatial_attention_backward", &boxed<"spatial_attention_backward", spatial_attention_backward>);
}
