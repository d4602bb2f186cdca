// Params of the kernels of attention over maps with any pattern, and their launches. Plain data, no torch.
//
// A task is a tile of queries, or keys, of one head: a box of tokens of one residue class. The tokens of the other side
// that any of them has to do with form a box as well, which passes by in row-major order. Coordinates in the box of keys
// are packed into one integer, with a field for each axis, so that one comparison asks on all axes at once whether a
// query sees a key.
#pragma once

#include <array>
#include <limits>
#include <type_traits>

#include "attention/cuda/launches.h"
#include "attention/unit_rows.h"

namespace vitkernels {

// Tokens of a tile that a block owns, and of one that passes by.
struct SpatialTile {
  int owned, streamed;
};

// By the padded head dimension. Owned tokens, and two stages of two tensors of the others, fit into 99 KB.
constexpr SpatialTile spatial_tile(int dim, int element_bytes) {
  const bool is_wide = element_bytes == 4;
  if (dim <= 64) return {.owned = 64, .streamed = 64};
  if (dim <= 128) return {.owned = 64, .streamed = is_wide ? 16 : 32};  // 64 keys spill
  return is_wide ? SpatialTile{.owned = 32, .streamed = 8} : SpatialTile{.owned = 64, .streamed = 16};
}

// Calls f(padded head dimension). Heads of 32 share the kernels of 64, whose loops follow the dimension.
template <class Function>
auto dispatch_spatial_dim(int64_t head_dim, int64_t value_dim, Function&& f) {
  const int64_t dim = std::max(head_dim, value_dim);
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  return dim <= 128 ? f(std::integral_constant<int, 128>{}) : f(std::integral_constant<int, 256>{});
}

// Of spatial_forward_plain.cu, for 16-bit elements. Instructions of the main loop for each matrix instruction, those of
// the mask included, sm_90, at 32, 64 and 128 columns: 6.3, 4.6, 3.5; with a table 9.1, 6.3, 4.5. Rejected: comparisons
// instead of products for the mask (21 at 32 columns, with sixteen queries a warp), a test of whether a warp sees a tile
// on either side of the barrier (32 instructions that clear accumulators). Not measured on a GPU yet.
constexpr SpatialTile spatial_plain_tile(int dim) { return {.owned = 128, .streamed = dim <= 64 ? 64 : 32}; }
inline constexpr int kMaxSpatialPlainDim = 128;
template <class Function>
auto dispatch_spatial_plain_dim(int64_t head_dim, int64_t value_dim, Function&& f) {
  const int64_t dim = std::max(head_dim, value_dim);
  if (dim <= 32) return f(std::integral_constant<int, 32>{});
  return dim <= 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
}

// A tile on one axis, and the box of tokens of the other side that it has to do with. All count tokens of the tile's
// residue class.
struct AxisBox {
  AxisRule rule;  // of the class
  int64_t residue;
  Range owned, streamed;
};

// One axis of a map, cut into tiles of at most `extent` queries, or keys, each class for itself. Where blocks of them
// have to do with the same tokens, no tile has tokens of two.
struct AxisCut {
  AxisRule rule;
  bool owns_keys = false;
  int classes = 1, tiles = 1, tiles_of_block = 0;  // tiles of a class; 0: of no block
  int extent = 1, streamed = 1;                    // tokens of a tile and of a box, at most
  Divisor by_extent, by_streamed;

  AxisCut() = default;
  AxisCut(const AxisRule& rule, int extent, bool owns_keys = false);

  VK_HOST_DEVICE int64_t num_tiles() const { return int64_t(classes) * tiles; }

  // Whether the tokens of a tile have to do with different tokens of its box.
  bool differ() const { return extent > 1 && (rule.is_causal || (rule.rule != Rule::kFull && tiles_of_block == 0)); }

  VK_HOST_DEVICE AxisBox box(int index) const {
    const int residue = index / tiles, tile = index - residue * tiles;
    AxisBox box{rule.of_class(residue), residue, {}, {0, 0}};
    if (tiles_of_block > 0) {
      const int block = tile / tiles_of_block, part = tile - block * tiles_of_block;
      const Range whole = block_of(box.rule, block);
      box.owned = intersect({whole.begin + part * extent, whole.begin + (part + 1) * extent}, whole);
    } else {
      const int64_t first = first_owned(box.rule), begin = first + int64_t(tile) * extent;
      box.owned = intersect({begin, begin + extent}, {first, end_owned(box.rule)});
    }
    if (!box.owned.empty()) box.streamed = owns_keys ? queries_of(box.rule, box.owned) : box.rule.any_keys(box.owned);
    if (box.streamed.empty()) box.streamed = {0, 0};
    return box;
  }

 private:
  // Keys outside the map, if there are any, are owned as well: their gradients are those of the fill.
  VK_HOST_DEVICE int64_t first_owned(const AxisRule& of_class) const {
    if (!owns_keys || !of_class.has_outside || of_class.num_queries <= 0) return 0;
    const int64_t first = of_class.keys(0).begin;
    return first < 0 ? first : 0;
  }
  VK_HOST_DEVICE int64_t end_owned(const AxisRule& of_class) const {
    if (!owns_keys) return of_class.num_queries;
    if (!of_class.has_outside || of_class.num_queries <= 0) return of_class.num_keys;
    const int64_t end = of_class.keys(of_class.num_queries - 1).end;
    return end > of_class.num_keys ? end : of_class.num_keys;
  }

  // The tokens that share a block of the rule, from the first that exist on.
  VK_HOST_DEVICE Range block_of(const AxisRule& of_class, int block) const {
    if (!owns_keys) return of_class.block(of_class.block_of(0) + block);
    const int64_t boundary = of_class.shift * of_class.key_size / of_class.size;
    const int64_t begin = boundary + (block - (boundary > 0 ? 1 : 0)) * of_class.key_size;
    return intersect({begin, begin + of_class.key_size}, {0, of_class.num_keys});
  }

  // The queries that see at least one of the keys: both ends of a key's queries are nondecreasing in the key.
  static VK_HOST_DEVICE Range queries_of(const AxisRule& of_class, Range keys) {
    return {of_class.queries(keys.begin).begin, of_class.queries(keys.end - 1).end};
  }
};

// Coordinates in a box, packed: each axis has a field that holds its number of keys, and a guard bit above.
struct PackedCoords {
  unsigned guards = 0;
  int first_bit[kMaxAxes] = {}, bits[kMaxAxes] = {};

  // For boxes of at most `sizes` keys. False if 32 bits are too few.
  bool fit(const std::array<int, kMaxAxes>& sizes);

  VK_HOST_DEVICE unsigned field(int axis, int coord) const { return unsigned(coord) << first_bit[axis]; }
  VK_HOST_DEVICE int coord(int axis, unsigned packed) const {
    return int(packed >> first_bit[axis] & ((1u << bits[axis]) - 1));
  }
  // Beyond every range.
  VK_HOST_DEVICE unsigned nowhere() const { return (1u << bits[kMaxAxes - 1]) - 1; }
};

// The columns of a pattern's matrices (pattern_mask.h): those of each axis on which tokens of a tile differ, and the
// rows of the table of its coordinates in the box. Column and row 0 are of no axis.
struct MaskColumns {
  static constexpr int kMost = 32, kMostRows = 128;

  int first[kMaxAxes] = {}, count[kMaxAxes] = {}, first_row[kMaxAxes] = {}, rows[kMaxAxes] = {};
  int num_columns = 1, num_rows = 1;

  MaskColumns() = default;
  explicit MaskColumns(const AxisCut (&axes)[kMaxAxes]);

  bool fit() const { return num_columns <= kMost && num_rows <= kMostRows; }
};

// The extents of the tiles of one side of a map that cost least, and what that is, roughly, in steps of a block. With a
// mask, of the tiles whose columns are few enough.
struct TileExtents {
  std::array<int, kMaxAxes> at{1, 1, 1};
  double cost = std::numeric_limits<double>::infinity();
};
TileExtents cheapest_extents(const SpatialPattern& pattern, SpatialTile tile, bool owns_keys, bool has_mask = false);

// Tiles of one side of the map.
struct SpatialCut {
  AxisCut axis[kMaxAxes];
  PackedCoords packed;
  MaskColumns mask;
  bool fits = false;  // into the types that kernels count in

  SpatialCut() = default;
  SpatialCut(const SpatialPattern& pattern, SpatialTile tile, bool owns_keys)
      : SpatialCut(pattern, tile, owns_keys, cheapest_extents(pattern, tile, owns_keys)) {}
  SpatialCut(const SpatialPattern& pattern, SpatialTile tile, bool owns_keys, const TileExtents& extents);

  VK_HOST_DEVICE int64_t num_tiles() const { return axis[0].num_tiles() * axis[1].num_tiles() * axis[2].num_tiles(); }
};

// Which kernel runs a forward (spatial_path.h).
enum class SpatialPath {
  kGeneral,  // spatial_forward.cu: everything
  kPlain,    // spatial_forward_plain.cu: 16-bit elements, and a score with a scale only
};

struct SpatialCudaParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  Integers kv_head_of;  // [heads], or absent: equal groups
  SpatialCut cut;
  int64_t radius_squared = -1;  // rounded down, as all distances are whole numbers; -1: none
  bool is_shared_query = false, allow_tf32 = false;
  bool has_outside = false;  // there are keys outside the map
  SpatialPath path = SpatialPath::kGeneral;
  bool is_aligned = false;  // addresses and lengths of all rows that are copied are multiples of 16 bytes
  Score score;
  MapTensor key_bias, query, key, value;
  const void *key_fill = nullptr, *value_fill = nullptr;  // [kv_heads, dim]: keys outside the map; null: zeros
  void* out = nullptr;                                    // [batch, *map, heads, value_dim]
  float* lse = nullptr;                                   // [batch, *map, heads]

  VK_HOST_DEVICE const AxisRule& rule(int axis) const { return cut.axis[axis].rule; }
  VK_HOST_DEVICE int64_t num_queries() const { return rule(0).num_queries * rule(1).num_queries * rule(2).num_queries; }
  VK_HOST_DEVICE int64_t num_keys() const { return rule(0).num_keys * rule(1).num_keys * rule(2).num_keys; }
  VK_HOST_DEVICE int64_t kv_head(int64_t head) const {
    if (!kv_head_of) return head / (heads / kv_heads);
    const int64_t mapped = kv_head_of[head];
    return mapped >= 0 && mapped < kv_heads ? mapped : -1;
  }
};

// The backward's kernels take all head dimensions up to this one.
inline constexpr int kMaxSpatialBackwardDim = 128;
constexpr SpatialTile spatial_backward_tile(int element_bytes) {
  return element_bytes == 4 ? SpatialTile{.owned = 32, .streamed = 16} : SpatialTile{.owned = 64, .streamed = 32};
}

// Gradients are contiguous, in the shapes of what they belong to.
struct SpatialBackwardCudaParams {
  SpatialCudaParams forward;  // without its results
  SpatialCut keys;            // tiles of keys, those outside the map included if the fills learn
  const void* grad_out = nullptr;
  const float* lse = nullptr;
  const float* delta = nullptr;  // [batch, *map, heads]: dO.O - dlse
  void *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr;
  // [batch, *map, heads, head_dim] instead of grad_query, or null: of a shared query, and with relative logits.
  float* float_grad_query = nullptr;
  float* relative_grad = nullptr;    // of the relative logits, in their layout, zero at first; or null
  float* dots = nullptr;             // [batch, *map, heads], or null: each query with its gradient before the scale
  float* key_bias_grad = nullptr;    // [batch, heads, *key_map], or null
  PartialSums key_fill, value_fill;  // a part for each batch and tile of keys: [kv_heads, dim]
  // A part for each warp of the blocks of a head: [heads, offsets], zero at first.
  PartialSums bias_table, multiplier_table;
  int64_t blocks_of_head = 1;  // that own queries

  int64_t num_fill_parts() const { return forward.batch * keys.num_tiles(); }
};

template <DType kDType>
struct SpatialLaunches {
  static cudaError_t forward(const SpatialCudaParams& params, cudaStream_t stream);
  static cudaError_t backward(const SpatialBackwardCudaParams& params, Side owner, cudaStream_t stream);
};

// The fast path of 16-bit dtypes (spatial_path.h).
template <DType kDType>
struct SpatialPlainLaunches {
  static cudaError_t forward(const SpatialCudaParams& params, cudaStream_t stream);
};

cudaError_t launch_spatial_attention(const SpatialCudaParams& params, cudaStream_t stream);
cudaError_t launch_spatial_attention_backward(const SpatialBackwardCudaParams& params, Side owner, cudaStream_t stream);

// Relative logits are products of each query with the embeddings of all offsets of an axis, axis after axis:
// [batch, heads, tokens, width].
cudaError_t launch_spatial_relative_logits(const SpatialCudaParams& params, float* logits, cudaStream_t stream);
// Adds what reaches the queries through them to params.float_grad_query.
cudaError_t launch_spatial_relative_grad_query(const SpatialBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_spatial_relative_grad_embedding(const SpatialBackwardCudaParams& params,
                                                   const EmbeddingGradient& gradient, cudaStream_t stream);
int64_t parts_of_spatial_embedding(const SpatialBackwardCudaParams& params, int axis);

// A sum over some axes of a contiguous tensor, in a fixed order. The others, in their order, are the result's.
struct AxesSum {
  static constexpr int kAxes = 8;

  int64_t size[kAxes] = {1, 1, 1, 1, 1, 1, 1, 1};
  bool is_summed[kAxes] = {};
  const float* data = nullptr;
  void* out = nullptr;
  DType dtype = DType::kFloat32;  // of the result
};

cudaError_t launch_unit_rows(const UnitRowsParams& params, cudaStream_t stream);
cudaError_t launch_axes_sum(const AxesSum& sum, cudaStream_t stream);

}  // namespace vitkernels
