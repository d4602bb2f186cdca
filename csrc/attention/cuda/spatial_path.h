// Which kernel runs a forward over a map on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/cuda/spatial_launches.h"

namespace vitkernels {

// Whether the rows of a tensor lie less than 2^31 vectors of 16 bytes apart.
inline bool has_near_rows(const MapTensor& t, const SpatialPattern& pattern) {
  double vectors = 0.0;
  for (int a = 0; a < kMaxAxes; ++a) {
    const AxisRule& rule = pattern.axis[a];
    vectors += double(std::max(rule.num_queries, rule.num_keys)) * std::abs(double(t.axis_stride[a])) / 8;
  }
  return vectors < double(std::numeric_limits<int32_t>::max());
}

// Of a table that a block keeps in shared memory: 9 KB, offsets in windows of 24 x 24.
inline constexpr int kMaxSpatialTable = 2304;

inline bool has_plain_score(const SpatialCudaParams& p) {
  const Score& score = p.score;
  const OffsetTerms& by_offset = score.by_offset;
  const bool is_plain = !score.multiplier.data && !score.bias.data && !by_offset.multiplier.data &&
                        !by_offset.has_rel_pos() && !score.head_scale && !p.key_bias.data && p.radius_squared < 0 &&
                        !p.key_fill && !p.value_fill;
  if (!is_plain || (by_offset.bias.data && num_table_entries(by_offset.small) > kMaxSpatialTable)) return false;
  // Without a table, the mask is added to the products, before they are scaled.
  const float scale = score.scale.as<float>();
  return scale > 1e-30f && scale < 1e30f;
}

// Gives a call that the fast path takes, and is faster there, its tiles.
inline void choose_path(SpatialCudaParams& p, const SpatialPattern& pattern) {
  // What a step costs of one of spatial_forward.cu, by their instructions.
  constexpr double kPlainStep = 0.8;
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  if (p.dtype == DType::kFloat32 || !p.is_aligned || dim > kMaxSpatialPlainDim || !has_plain_score(p)) return;
  if (!has_near_rows(p.query, pattern) || !has_near_rows(p.key, pattern) || !has_near_rows(p.value, pattern)) return;
  const SpatialTile tile = dispatch_spatial_plain_dim(
      p.head_dim, p.value_dim, [](auto padded) { return spatial_plain_tile(decltype(padded)::value); });
  const SpatialCut cut(pattern, tile, false, SpatialCut::Masks::kWanted);
  const double blocks = double(p.batch) * double(p.heads) * double(cut.num_tiles());
  if (!cut.fits || !cut.mask.fit() || kPlainStep * cut.cost > p.cut.cost) return;
  if (blocks > double(std::numeric_limits<int32_t>::max())) return;
  p.cut = cut, p.path = SpatialPath::kPlain;
}

}  // namespace vitkernels
