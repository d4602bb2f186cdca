#include "attention/op/spatial_gradients.h"

#include "attention/cpu/tile_sizes.h"

namespace vitkernels {
namespace {

// Kernels write every element, unless there is nothing to do.
Tensor gradient_of(const Tensor& t, bool is_zero) { return is_zero ? zeros_as(t) : empty_as(t); }

// If every key is in one tile and read by one query head, that tile computes the key's whole gradient.
bool key_has_one_tile(const SpatialArguments& args, const SpatialParams& params) {
  for (const TiledAxis& axis : args.tiled_axes) {
    if (!axis.covers_keys_once) return false;
  }
  for (int64_t g = 0; g < params.kv_heads; ++g) {
    if (params.groups.first_head[g + 1] - params.groups.first_head[g] != 1) return false;
  }
  return true;
}

void* data(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }
double* sums(const OptionalTensor& t) { return static_cast<double*>(data(t)); }

// The sum over the first dimension, times a factor, in the shape and type of `like`.
Tensor sum_of_parts(const Tensor& parts, double factor, const Tensor& like) {
  const int64_t count = like.numel(), num_parts = parts.size(0);
  Tensor total = empty_as(like, sizes_of(like), ScalarType::Double);
  const double* from = static_cast<const double*>(parts.const_data_ptr());
  double* to = static_cast<double*>(total.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < num_parts; ++part) sum += from[part * count + i];
    to[i] = factor * sum;
  }
  return torch::stable::to(total, like.scalar_type());
}

// Reduces partial sums [splits, B, heads, *key_map] to the shape of a key bias, in double and in order.
Tensor sum_key_bias(const Tensor& parts, const Tensor& bias, int axes, const SpatialParams& params) {
  const Tensor grad = zeros_as(bias, sizes_of(bias), ScalarType::Double);
  const MapTensor strides = key_bias_tensor(grad, axes);
  dispatch_statistics(parts, [&]<class T>(T) {
    const T* from = static_cast<const T*>(parts.const_data_ptr());
    const int64_t* size = params.key_size;
    for (int64_t row = 0; row < parts.size(0) * params.batch * params.heads; ++row) {
      const int64_t head = row % params.heads, batch = row / params.heads % params.batch;
      for (int64_t line = 0; line < size[0] * size[1]; ++line) {
        double* at = strides.at<double>(batch, {{line / size[1], line % size[1], 0}}, head);
        for (int64_t i = 0; i < size[2]; ++i) at[i * strides.axis_stride[2]] += *from++;
      }
    }
  });
  return torch::stable::to(grad, bias.scalar_type());
}

}  // namespace

SpatialGradients::SpatialGradients(const SpatialArguments& args, const ScoreFields<bool>& needed,
                                   SpatialBackwardParams& params)
    : query(gradient_of(args.query, args.is_empty())),
      key(gradient_of(args.key, args.is_empty())),
      value(gradient_of(args.value, args.is_empty())),
      offset_gradients(args.tables, needed) {
  params.grad_query = map_tensor(query, args.axes);
  params.grad_key = map_tensor(key, args.axes);
  params.grad_value = map_tensor(value, args.axes);
  params.batch_groups = spatial_batch_groups(args.batch, args.kv_heads, offset_gradients.any());
  const bool has_sums = !key_has_one_tile(args, params.forward);
  params.splits = spatial_backward_splits(params.forward, params.batch_groups, has_sums);
  const int64_t parts = params.batch_groups * params.splits;
  const auto zeros = [&](bool is_needed, const std::vector<int64_t>& sizes, ScalarType type) {
    return is_needed ? OptionalTensor(zeros_as(args.query, sizes, type)) : std::nullopt;
  };
  if (!args.is_empty()) {
    if (has_sums) key_sums.attach_keys(args, params, key), value_sums.attach_keys(args, params, value);
    if (args.is_shared_query) query_sums.attach_window(args, params, query);
  }
  params.key_sums = key_sums.view(), params.value_sums = value_sums.view(), params.query_sums = query_sums.view();
  key_fill_sums = zeros(needed.key_fill, {parts, args.kv_heads, args.head_dim}, ScalarType::Double);
  value_fill_sums = zeros(needed.value_fill, {parts, args.kv_heads, args.value_dim}, ScalarType::Double);
  head_scale_sums = zeros(needed.head_scale, {parts, args.heads}, ScalarType::Double);
  key_bias_sums = zeros(needed.key_bias, {params.splits, args.batch, args.heads, params.forward.num_keys()},
                        statistics_type(args.dtype));
  params.key_fill_sums = sums(key_fill_sums), params.value_fill_sums = sums(value_fill_sums);
  params.head_scale_sums = sums(head_scale_sums);
  params.forward.score.key_bias.grad = data(key_bias_sums);
  offset_gradients.allocate(params.forward.score.by_offset, args.heads, parts, args.query);
}

void SpatialGradients::finish(const SpatialArguments& args, const SpatialBackwardParams& params) {
  key_sums.finish(), value_sums.finish(), query_sums.finish();
  const ScoreFields<OptionalTensor>& given = args.score.terms;
  if (key_fill_sums) terms.key_fill = sum_of_parts(*key_fill_sums, 1.0, *given.key_fill);
  if (value_fill_sums) terms.value_fill = sum_of_parts(*value_fill_sums, 1.0, *given.value_fill);
  if (head_scale_sums) terms.head_scale = sum_of_parts(*head_scale_sums, args.score.scale, *given.head_scale);
  if (key_bias_sums) terms.key_bias = sum_key_bias(*key_bias_sums, *given.key_bias, args.axes, params.forward);
  offset_gradients.finish(args.heads, terms);
}

}  // namespace vitkernels
