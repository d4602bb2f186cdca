#include "attention/cuda/spatial_launches.h"

#include <bit>
#include <cmath>

namespace vitkernels {
namespace {

// A side of the map on one axis.
struct SideOfAxis {
  const AxisRule& rule;
  bool owns_keys;

  int64_t num_tokens() const { return owns_keys ? rule.num_keys : rule.num_queries; }
  int64_t of_class() const { return std::max<int64_t>((num_tokens() + rule.step - 1) / rule.step, 1); }
  // Tokens of a block that nothing outside it has to do with, 0 if there are none: keys outside the map are of no block.
  int64_t block() const {
    if (rule.rule != Rule::kBlock || (owns_keys && (rule.halo > 0 || rule.has_outside))) return 0;
    return std::min(owns_keys ? rule.key_size : rule.size, of_class());
  }
  int64_t longest() const { return block() > 0 ? block() : of_class(); }
};

// Of a class, roughly: tiles, and tokens of a box.
struct Estimate {
  double tiles, streamed;

  Estimate(const SideOfAxis& side, int extent) {
    const AxisRule& rule = side.rule;
    const double tokens = double(side.of_class()), length = double(side.longest());
    const double others = std::max(double(side.owns_keys ? rule.num_queries : rule.num_keys) / double(rule.step), 1.0);
    const double ratio = others / tokens;
    tiles = std::ceil(length / extent) * std::ceil(tokens / length);
    if (rule.rule == Rule::kFull) {
      streamed = others;
    } else if (rule.rule == Rule::kBlock) {
      streamed = side.block() > 0 ? double(side.owns_keys ? rule.size : rule.key_size + 2 * rule.halo)
                                  : (extent + 2.0 * double(rule.halo)) * ratio + double(rule.size);
    } else {
      streamed = std::min((extent - 1) * ratio + double(rule.size + rule.stride - 1), others);
    }
  }
};

}  // namespace

TileExtents cheapest_extents(const SpatialPattern& pattern, SpatialTile tile, bool owns_keys, bool has_mask) {
  // What a tile costs besides its steps, in steps: at its ends, and for the bytes of its box.
  constexpr double kStepsOfTile = 1.5, kStepsOfBytes = 0.5;
  TileExtents best;
  const auto side = [&](int axis) { return SideOfAxis{pattern.axis[axis], owns_keys}; };
  const auto longest = [&](int axis) { return int(std::min<int64_t>(side(axis).longest(), tile.owned)); };
  // About a hundred choices at most: the host makes them for every call.
  const auto next = [&](int axis, int extent) {
    const int wanted = extent < 8 ? extent + 1 : extent < 16 ? extent + 2 : extent + 8;
    return extent < longest(axis) ? std::min(wanted, longest(axis)) : wanted;
  };
  const auto differ = [&](int axis, int extent) {
    const AxisRule& rule = pattern.axis[axis];
    return extent > 1 && (rule.is_causal || (rule.rule != Rule::kFull && side(axis).block() == 0));
  };
  const auto columns = [&](int axis, int extent) { return has_mask && differ(axis, extent) ? extent : 0; };
  for (int i = 1; i <= longest(0); i = next(0, i)) {
    for (int j = 1; j <= longest(1) && i * j <= tile.owned; j = next(1, j)) {
      // The longest on the last axis: neighbouring rows lie in the same sectors.
      int k = std::min(tile.owned / (i * j), longest(2));
      const int left = MaskColumns::kMost - 1 - columns(0, i) - columns(1, j);
      if (left < 0) continue;
      if (columns(2, k) > left) k = std::max(left, 1);
      double tiles = 1.0, streamed = 1.0, rows = 1.0;  // rows: of the mask's table
      const std::array<int, kMaxAxes> extents{i, j, k};
      for (int axis = 0; axis < kMaxAxes; ++axis) {
        const Estimate e(side(axis), extents[axis]);
        tiles *= e.tiles, streamed *= e.streamed;
        if (has_mask && differ(axis, extents[axis])) rows += std::ceil(e.streamed);
      }
      if (rows > MaskColumns::kMostRows) continue;
      const double full_steps = streamed / tile.streamed;
      const double cost = tiles * (std::ceil(full_steps) + kStepsOfTile + kStepsOfBytes * full_steps);
      if (cost < best.cost) best = {extents, cost};
    }
  }
  return best;
}

AxisCut::AxisCut(const AxisRule& rule, int extent, bool owns_keys)
    : rule(rule), owns_keys(owns_keys), extent(extent), by_extent(extent) {
  const SideOfAxis side{rule, owns_keys};
  // Where keys outside the map are owned, also those of classes that have no others.
  const int64_t tokens = owns_keys && rule.has_outside ? std::max(rule.num_queries, rule.num_keys) : side.num_tokens();
  classes = int(std::max<int64_t>(std::min(rule.step, tokens), 1));
  const int64_t block = side.block();
  tiles_of_block = int((block + extent - 1) / extent);
  for (int r = 0; r < classes; ++r) {
    const AxisRule of_class = rule.of_class(r);
    int64_t count = (end_owned(of_class) - first_owned(of_class) + extent - 1) / extent;
    if (block > 0) {
      int64_t blocks = 0;
      while (blocks == 0 || !block_of(of_class, int(blocks)).empty()) ++blocks;
      count = blocks * tiles_of_block;
    }
    tiles = std::max(tiles, int(count));
  }
  for (int i = 0; i < num_tiles(); ++i) {
    const Range box = this->box(i).streamed;
    streamed = std::max(streamed, int(box.end - box.begin));
  }
  by_streamed = Divisor(streamed);
}

bool PackedCoords::fit(const std::array<int, kMaxAxes>& sizes) {
  int next = 0;
  for (int a = kMaxAxes - 1; a >= 0; --a) {
    first_bit[a] = next;
    bits[a] = std::bit_width(unsigned(sizes[a]));
    next += bits[a] + 1;
    if (next > 32) return false;
    guards |= 1u << (next - 1);
  }
  return true;
}

MaskColumns::MaskColumns(const AxisCut (&axes)[kMaxAxes]) {
  for (int a = 0; a < kMaxAxes; ++a) {
    if (!axes[a].differ()) continue;
    first[a] = num_columns, count[a] = axes[a].extent;
    first_row[a] = num_rows, rows[a] = axes[a].streamed;
    num_columns += count[a], num_rows += rows[a];
  }
}

SpatialCut::SpatialCut(const SpatialPattern& pattern, SpatialTile tile, bool owns_keys, const TileExtents& extents) {
  std::array<int, kMaxAxes> keys;
  double streamed = 1.0, tiles = 1.0;
  for (int a = 0; a < kMaxAxes; ++a) {
    axis[a] = AxisCut(pattern.axis[a], extents.at[a], owns_keys);
    keys[a] = owns_keys ? axis[a].extent : axis[a].streamed;
    streamed *= double(axis[a].streamed);
    tiles *= double(axis[a].num_tiles());
  }
  constexpr double kMost = double(std::numeric_limits<int32_t>::max());
  mask = MaskColumns(axis);
  fits = packed.fit(keys) && streamed < kMost - tile.streamed && tiles < kMost;
}

cudaError_t launch_spatial_attention(const SpatialCudaParams& params, cudaStream_t stream) {
  if (params.path == SpatialPath::kPlain) {
    if (params.dtype == DType::kBFloat16) return SpatialPlainLaunches<DType::kBFloat16>::forward(params, stream);
    return SpatialPlainLaunches<DType::kFloat16>::forward(params, stream);
  }
  if (params.dtype == DType::kFloat32) return SpatialLaunches<DType::kFloat32>::forward(params, stream);
  if (params.dtype == DType::kBFloat16) return SpatialLaunches<DType::kBFloat16>::forward(params, stream);
  return SpatialLaunches<DType::kFloat16>::forward(params, stream);
}

cudaError_t launch_spatial_attention_backward(const SpatialBackwardCudaParams& p, Side owner, cudaStream_t stream) {
  const DType dtype = p.forward.dtype;
  if (dtype == DType::kFloat32) return SpatialLaunches<DType::kFloat32>::backward(p, owner, stream);
  if (dtype == DType::kBFloat16) return SpatialLaunches<DType::kBFloat16>::backward(p, owner, stream);
  return SpatialLaunches<DType::kFloat16>::backward(p, owner, stream);
}

}  // namespace vitkernels
