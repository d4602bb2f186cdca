#include "attention/op/spatial_sums.h"

#include "attention/cpu/tile_sizes.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

// A range that contains all keys that these tiles see.
Range keys_of_tiles(const SpatialParams& p, Range tiles) {
  Range any{p.num_keys(), 0};
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    int64_t index = t, first = 0, last = 0, inner = 1;
    for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
      const AxisTile& tile = p.axis[axis].tile[index % p.axis[axis].count];
      index /= p.axis[axis].count;
      const int64_t end = tile.first_key + (tile.num_keys - 1) * p.axis[axis].step;
      first += inner * std::max<int64_t>(tile.first_key, 0), last += inner * std::min(end, p.key_size[axis] - 1);
      inner *= p.key_size[axis];
    }
    any = {std::min(any.begin, first), std::max(any.end, last + 1)};
  }
  return any.empty() ? Range{0, 0} : any;
}

std::vector<SplitTokens> keys_of_splits(const SpatialBackwardParams& params) {
  const SpatialParams& p = params.forward;
  const int64_t num_tiles = p.num_tiles(), splits = params.splits;
  std::vector<SplitTokens> result;
  int64_t end = 0, row = 0;
  for (int64_t split = 0; split < splits; ++split) {
    const Range keys = keys_of_tiles(p, {num_tiles * split / splits, num_tiles * (split + 1) / splits});
    const Range shared = intersect(keys, {0, end});
    SplitTokens tokens{{end, std::max(end, keys.end)}, shared.empty() ? Range{0, 0} : shared, row};
    if (split == splits - 1) tokens.owned.end = p.num_keys();  // also keys that no query sees
    end = tokens.owned.end, row += tokens.shared.end - tokens.shared.begin;
    result.push_back(tokens);
  }
  return result;
}

std::vector<SplitTokens> window_of_splits(const SpatialBackwardParams& params) {
  const int64_t window = params.forward.max_queries();
  std::vector<SplitTokens> result{{{0, window}, {0, 0}, 0}};
  for (int64_t split = 1; split < params.splits; ++split) result.push_back({{0, 0}, {0, window}, (split - 1) * window});
  return result;
}

// Rows of `width` elements, the rows of a head contiguous.
MapTensor packed(const Tensor& t, int64_t heads, const int64_t (&size)[kMaxAxes], int64_t width) {
  const int64_t line = size[2] * width, plane = size[1] * line, head = size[0] * plane;
  return {t.mutable_data_ptr(), heads * head, {plane, line, width}, head};
}

}  // namespace

void MapPartialSumsOwner::attach_keys(const SpatialArguments& args, const SpatialBackwardParams& params,
                                      const Tensor& gradient) {
  of_split = keys_of_splits(params);
  allocate(args, gradient, params.forward.key_size, false);
}

void MapPartialSumsOwner::attach_window(const SpatialArguments& args, const SpatialBackwardParams& params,
                                        const Tensor& gradient) {
  const AxisTiles(&axis)[kMaxAxes] = params.forward.axis;
  of_split = window_of_splits(params);
  allocate(args, gradient, {axis[0].max_queries, axis[1].max_queries, axis[2].max_queries}, true);
}

void MapPartialSumsOwner::allocate(const SpatialArguments& args, const Tensor& gradient,
                                   const int64_t (&size)[kMaxAxes], bool is_zero) {
  const int64_t heads = gradient.size(args.axes + 1), dim = gradient.size(args.axes + 2);
  const int64_t lanes = vector_bytes(isa()) / (args.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
  const int64_t width = (dim + lanes - 1) / lanes * lanes;
  const ScalarType type = statistics_type(args.dtype);
  const auto tensor = [&](const std::vector<int64_t>& sizes) {
    return is_zero ? zeros_as(gradient, sizes, type) : empty_as(gradient, sizes, type);
  };
  sums = {.dtype = args.dtype,
          .gradient = map_tensor(gradient, args.axes),
          .owned = {},
          .of_split = of_split.data(),
          .splits = int64_t(of_split.size()),
          .batch = args.batch,
          .heads = heads,
          .dim = dim,
          .width = width};
  std::copy_n(size, kMaxAxes, sums.size);

  // Sums in the gradient itself, if it has such rows: less memory, and no copy.
  const bool is_in_place = !is_zero && gradient.scalar_type() == type && width == dim;
  if (!is_in_place) owned = tensor({args.batch, heads, size[0] * size[1] * size[2], width});
  sums.owned = is_in_place ? sums.gradient : packed(*owned, heads, size, width);

  const SplitTokens& last = of_split.back();
  const int64_t shared = last.first_row + last.shared.end - last.shared.begin;
  if (shared > 0) parts = tensor({shared, args.batch, heads, width});
  sums.parts = parts ? parts->mutable_data_ptr() : nullptr;
}

void MapPartialSumsOwner::finish() const {
  if (!owned && !parts) return;  // summed in place, or nothing was attached
  torch::stable::parallel_for(0, sums.num_lines(), 1, [&](int64_t begin, int64_t end) {
    kernel<MapPartialSums>().run(sums, begin, end, nullptr);
  });
}

}  // namespace vitkernels
