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

inline bool has_plain_operands(const SpatialCudaParams& p, const SpatialPattern& pattern) {
  return p.dtype != DType::kFloat32 && p.is_aligned && std::max(p.head_dim, p.value_dim) <= kMaxSpatialPlainDim &&
         has_near_rows(p.query, pattern) && has_near_rows(p.key, pattern) && has_near_rows(p.value, pattern);
}

// Cuts the map for the kernel that takes a forward; `tile` is the general one's.
inline void choose_path(SpatialCudaParams& p, const SpatialPattern& pattern, SpatialTile tile) {
  // What a step costs of one of spatial_forward.cu, roughly, by their instructions.
  constexpr double kPlainStep = 0.8;
  const TileExtents extents = cheapest_extents(pattern, tile, false);
  if (has_plain_operands(p, pattern) && has_plain_score(p)) {
    const SpatialTile plain_tile = dispatch_spatial_plain_dim(
        p.head_dim, p.value_dim, [](auto padded) { return spatial_plain_tile(decltype(padded)::value); });
    const TileExtents plain = cheapest_extents(pattern, plain_tile, false, true);
    if (kPlainStep * plain.cost <= extents.cost) {
      p.cut = SpatialCut(pattern, plain_tile, false, plain);
      const double blocks = double(p.batch) * double(p.heads) * double(p.cut.num_tiles());
      if (p.cut.fits && p.cut.mask.fit() && blocks <= double(std::numeric_limits<int32_t>::max())) {
        p.path = SpatialPath::kPlain;
        return;
      }
    }
  }
  p.cut = SpatialCut(pattern, tile, false, extents);
}

}  // namespace vitkernels
