#include "attention/op/spatial_params_cuda.h"

#include <cmath>

#include "attention/cuda/spatial_path.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

Integers integers_if_given(const OptionalTensor& t) { return t ? integers(*t) : Integers{}; }

bool is_aligned_fill(const OptionalTensor& fill) { return !fill || has_aligned_rows(*fill); }

// Rounded down; -1 without a radius.
int64_t squared(double radius) {
  return radius > 0 ? int64_t(std::min(std::floor(radius * radius), double(int64_t(1) << 62))) : -1;
}

// Why no kernel takes a call; null, if one does.
const char* why_not(const SpatialArguments& args, bool fits, int64_t num_tiles) {
  constexpr double kMost = double(std::numeric_limits<int32_t>::max());
  double tokens = 1.0;
  for (const AxisRule& rule : args.pattern.axis) tokens *= double(std::max(rule.num_queries, rule.num_keys));
  if (args.dtype == DType::kFloat64) return "in float64";
  if (std::max(args.head_dim, args.value_dim) > kMaxCudaHeadDim) return "of a head dimension above 256";
  if (tokens > kMost) return "of 2^31 tokens and more";
  if (!fits) return "of queries with so many keys";
  if (double(args.batch) * double(args.heads) * double(num_tiles) > kMost) return "of so many queries";
  return nullptr;
}

}  // namespace

bool has_aligned_rows(const Tensor& t) {
  const auto bytes = int64_t(t.element_size());
  bool is_aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    is_aligned = is_aligned && (t.size(i) == 1 || t.stride(i) * bytes % 16 == 0);
  return is_aligned && t.size(t.dim() - 1) * bytes % 16 == 0;
}

namespace {

// Without a cut.
SpatialCudaParams uncut_params(const SpatialArguments& args) {
  SpatialParams spatial;
  args.fill(spatial);
  const ScoreFields<OptionalTensor>& terms = args.score.terms;
  SpatialCudaParams params{.dtype = args.dtype,
                           .batch = args.batch,
                           .heads = args.heads,
                           .kv_heads = args.kv_heads,
                           .head_dim = args.head_dim,
                           .value_dim = args.value_dim,
                           .kv_head_of = integers_if_given(args.score.head_map),
                           .radius_squared = squared(args.pattern.radius),
                           .is_shared_query = args.is_shared_query,
                           .is_aligned = has_aligned_rows(args.query) && has_aligned_rows(args.key) &&
                                         has_aligned_rows(args.value) && is_aligned_fill(terms.key_fill) &&
                                         is_aligned_fill(terms.value_fill),
                           .score = spatial.score,
                           .key_bias = spatial.key_bias(),
                           .query = spatial.query,
                           .key = spatial.key,
                           .value = spatial.value,
                           .key_fill = spatial.key_fill,
                           .value_fill = spatial.value_fill};
  for (const AxisRule& rule : args.pattern.axis) params.has_outside = params.has_outside || rule.has_outside;
  return params;
}

void check_cut(const Checker& checker, const SpatialArguments& args, const SpatialCudaParams& params) {
  if (const char* reason = why_not(args, params.cut.fits, params.cut.num_tiles())) {
    checker.check(false, "got CUDA tensors, takes tensors on the CPU for attention over maps ", reason);
  }
}

}  // namespace

SpatialCudaParams spatial_cuda_params(const Checker& checker, const SpatialArguments& args, SpatialTile tile) {
  SpatialCudaParams params = uncut_params(args);
  params.cut = SpatialCut(args.pattern, tile, false);
  check_cut(checker, args, params);
  return params;
}

SpatialCudaParams spatial_forward_params(const Checker& checker, const SpatialArguments& args) {
  SpatialCudaParams params = uncut_params(args);
  const SpatialTile tile = dispatch_spatial_dim(args.head_dim, args.value_dim, [&](auto dim) {
    return spatial_tile(decltype(dim)::value, args.dtype == DType::kFloat32 ? 4 : 2);
  });
  choose_path(params, args.pattern, tile);
  check_cut(checker, args, params);
  return params;
}

OptionalTensor launch_spatial_relative_logits(const Checker& checker, const SpatialArguments& args,
                                              SpatialCudaParams& params, cudaStream_t stream) {
  OffsetTerms& terms = params.score.by_offset;
  if (!terms.has_rel_pos()) return {};
  DeviceRelativeLogits& relative = terms.relative;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    relative.first[axis] = relative.width;
    if (terms.rel_pos[axis].data) relative.width += terms.small.num_offsets(axis);
  }
  relative.head_stride = params.num_queries() * relative.width;
  relative.batch_stride = params.heads * relative.head_stride;
  const Tensor logits = empty_as(args.query, {args.batch, relative.batch_stride}, ScalarType::Float);
  relative.data = static_cast<const float*>(logits.const_data_ptr());
  check_cuda(checker, launch_spatial_relative_logits(params, static_cast<float*>(logits.mutable_data_ptr()), stream));
  return logits;
}

}  // namespace vitkernels
