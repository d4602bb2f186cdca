// The operators vitkernels::spatial_attention and vitkernels::spatial_attention_backward on a GPU: windows and grids.
#include "attention/cuda/windows.h"
#include "attention/op/arguments_cuda.h"
#include "attention/op/partial_sums_cuda.h"
#include "attention/op/spatial_arguments.h"
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

// Why no kernel takes a call; null, if one does.
const char* why_not(const SpatialArguments& args, const WindowAxes& axes) {
  const ScoreFields<OptionalTensor>& terms = args.score.terms;
  const auto has = [](const auto& term) { return term.has_value(); };
  int64_t slots = 1;
  double tokens = double(args.batch);
  for (const WindowAxis& axis : axes) slots *= axis.size, tokens *= axis.tokens;
  if (args.dtype == DType::kFloat32 || args.dtype == DType::kFloat64) return "of other dtypes";
  if (slots == 0) return "of other patterns";
  if (slots > kMaxWindowTokens) return "of more tokens";
  if (tokens > std::numeric_limits<int32_t>::max()) return "of a batch of 2^31 tokens and more";
  if (std::max(args.head_dim, args.value_dim) > 64 || args.head_dim % 8 != 0 || args.value_dim % 8 != 0) {
    return "of other head dimensions";
  }
  if (args.is_shared_query) return "with a shared query";
  if (args.score.has_outside) return "with keys outside the map";
  if (args.pattern.radius > 0) return "with a radius";
  if (args.score.head_map) return "with a head_map";
  if (terms.head_scale) return "with a scale of each head";
  if (terms.key_bias) return "with a key_bias";
  if (terms.multiplier_table) return "with a multiplier_table";
  if (std::any_of(terms.rel_pos.begin(), terms.rel_pos.end(), has)) return "with rel_pos";
  if (!(args.score.scale > 1e-30 && args.score.scale < 1e30)) return "with such a scale";
  return nullptr;
}

// The map's tokens, row by row: one distance from each to the next.
TokenTensor token_rows(const Tensor& t, int axes) {
  const MapTensor map = map_tensor(t, axes);
  TokenTensor rows{map.data, map.batch_stride, 0, map.head_stride, false};
  bool is_aligned =
      reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.batch_stride % 8 == 0 && map.head_stride % 8 == 0;
  int64_t next = 0;
  for (int axis = axes - 1; axis >= 0; --axis) {
    if (t.size(1 + axis) == 1) continue;
    if (next == 0) rows.token_stride = t.stride(1 + axis);
    is_aligned = is_aligned && (next == 0 || t.stride(1 + axis) == next);
    next = t.stride(1 + axis) * t.size(1 + axis);
  }
  rows.is_aligned = is_aligned && rows.token_stride % 8 == 0 && rows.token_stride < kMaxWindowStride;
  return rows;
}

Tensor with_token_rows(const Tensor& t, int axes) { return token_rows(t, axes).is_aligned ? t : as_contiguous(t); }

// What the kernels read of a call: its rows, or copies of them where they are not one distance apart.
struct WindowOperands {
  Tensor query, key, value;
  WindowCudaParams params;

  WindowOperands(const Checker& checker, const SpatialArguments& args)
      : query(with_token_rows(args.query, args.axes)),
        key(with_token_rows(args.key, args.axes)),
        value(with_token_rows(args.value, args.axes)) {
    WindowAxes axes;
    for (int axis = 0; axis < kMaxAxes; ++axis) axes[axis] = window_axis(args.pattern.axis[axis]);
    if (const char* reason = why_not(args, axes)) {
      checker.check(
          false, "got CUDA tensors, takes tensors on the CPU for attention over maps ", reason,
          "; on a GPU windows and grids of at most ", kMaxWindowTokens,
          " tokens that divide the map, in bfloat16 or float16, with a head dimension of at most 64 that is a "
          "multiple of 8, and with a bias_table");
    }
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
              .table = static_cast<const float*>(spatial.score.by_offset.bias.data),
              .table_head_stride = spatial.score.by_offset.bias.head_stride,
              .grid = spatial.score.by_offset.small};
    std::copy(axes.begin(), axes.end(), params.axis);
  }
};

void spatial_attention(Call& call) {
  const SpatialArguments args(call.checker, take_spatial(call), device_policy());
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);
  if (!args.is_empty()) {
    WindowOperands operands(call.checker, args);
    operands.params.out = token_rows(out, args.axes);
    operands.params.lse = static_cast<float*>(lse.mutable_data_ptr());
    const OnDevice device(args.query);
    check_cuda(call.checker, launch_window_attention(operands.params, device.stream()));
  }
  call.give(out, "out");
  call.give(lse, "lse");
}

void spatial_attention_backward(Call& call) {
  SpatialCall forward = take_spatial(call);
  BackwardCall from(call, forward.score);
  const SpatialArguments args(call.checker, std::move(forward), device_policy());
  from.check(call.checker, args.query, args.out_sizes());
  const bool is_empty = args.is_empty();
  const auto gradient_of = [&](const Tensor& t) { return is_empty ? zeros_as(t) : empty_as(t); };
  const Tensor query = gradient_of(args.query), key = gradient_of(args.key), value = gradient_of(args.value);
  const ScoreFields<OptionalTensor>& given = args.score.terms;
  ScoreFields<OptionalTensor> terms;
  if (from.needed.bias_table) terms.bias_table = zeros_as(*given.bias_table);
  if (from.needed.head_scale) terms.head_scale = zeros_as(*given.head_scale);
  if (!is_empty) {
    const WindowOperands operands(call.checker, args);
    call.checker.check(args.kv_heads == args.heads, "key has ", args.kv_heads, " heads, takes query's ", args.heads,
                       " for gradients on a GPU");
    const Tensor grad_out = with_token_rows(from.grad_out, args.axes);
    WindowBackwardCudaParams params{.forward = operands.params,
                                    .grad_out = token_rows(grad_out, args.axes),
                                    .grad_query = token_rows(query, args.axes),
                                    .grad_key = token_rows(key, args.axes),
                                    .grad_value = token_rows(value, args.axes)};
    if (from.grad_lse) params.grad_lse = static_cast<const float*>(from.grad_lse->const_data_ptr());
    const OnDevice device(args.query);
    const int64_t parts = window_parts(params.forward);
    std::vector<PartialSumsOwner> owners;
    const auto sums_of = [&](const OptionalTensor& grad, int64_t of_head, PartialSumsOwner::Start start) {
      return grad ? owners.emplace_back(*grad, parts, args.heads * of_head, start).sums() : PartialSums{};
    };
    const DeviceOffsetGrid& grid = params.forward.grid;
    const int64_t offsets = int64_t(grid.num_offsets(0)) * grid.num_offsets(1) * grid.num_offsets(2);
    params.table = sums_of(terms.bias_table, offsets, PartialSumsOwner::Start::kZero);
    params.head_scale = sums_of(terms.head_scale, 1, PartialSumsOwner::Start::kAnything);
    check_cuda(call.checker, launch_window_attention_backward(params, device.stream()));
    for (const PartialSumsOwner& sums : owners) {
      check_cuda(call.checker, sums.add(DType::kFloat32, device.stream()));
    }
  }
  call.give(query, "grad_query");
  call.give(key, "grad_key");
  call.give(value, "grad_value");
  give_gradients(call, terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("spatial_attention", &boxed<"spatial_attention", spatial_attention>);
  m.impl("spatial_attention_backward", &boxed<"spatial_attention_backward", spatial_attention_backward>);
}
