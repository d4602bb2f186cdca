// Params of the kernels of attention over maps. Plain data, no torch.
//
// A task is a query tile: a box of tokens of one residue class, the product of one tile per axis. The keys that any of
// them sees form a box as well. Rows and columns of a tile number the tokens of these boxes in row-major order.
#pragma once

#include "attention/dense.h"

namespace vitkernels {

// A tensor [batch, *map, heads, dim] with a unit last stride. Strides are in elements; axes that a map lacks have none.
struct MapTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, axis_stride[kMaxAxes] = {}, head_stride = 0;

  // Whether the strides equal another tensor's.
  VK_HOST_DEVICE bool is_laid_out_as(const MapTensor& other) const {
    bool same = batch_stride == other.batch_stride && head_stride == other.head_stride;
    for (int axis = 0; axis < kMaxAxes; ++axis) same = same && axis_stride[axis] == other.axis_stride[axis];
    return same;
  }

  template <class S>
  VK_HOST_DEVICE S* at(int64_t batch, const Coord& coord, int64_t head) const {
    return static_cast<S*>(data) + batch * batch_stride + coord.at[0] * axis_stride[0] + coord.at[1] * axis_stride[1] +
           coord.at[2] * axis_stride[2] + head * head_stride;
  }
};

// The keys of one query on one axis, and its own coordinate, relative to the tile's first key.
struct SeenKeys {
  Range keys;
  int64_t coord;
};

// A tile of queries on one axis. Queries and keys are `step` apart; keys may lie outside the map.
struct AxisTile {
  int64_t first_query, num_queries, first_key, num_keys;
  int64_t geometry;      // tiles of the same geometry have equal `seen`
  bool sees_all;         // every query sees every key
  const SeenKeys* seen;  // [num_queries]
};

struct AxisTiles {
  const AxisTile* tile = nullptr;
  int64_t count = 0, num_geometries = 0, max_queries = 0, max_keys = 0, step = 1;
  bool see_all = true;
};

struct SpatialParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  HostHeadGroups groups;
  int64_t query_size[kMaxAxes] = {1, 1, 1}, key_size[kMaxAxes] = {1, 1, 1};  // of the maps
  AxisTiles axis[kMaxAxes];
  double radius = 0.0;  // 0: none
  bool is_shared_query = false;
  Score score;                       // key_bias.grad is [splits, batch, heads, keys], zero at first
  MapTensor query, key, value, out;  // heads / kv_heads / kv_heads / heads
  const void* key_fill = nullptr;    // [kv_heads, dim], contiguous: keys outside the map; null: zeros
  const void* value_fill = nullptr;
  void* lse = nullptr;  // [batch, *map, heads], contiguous

  DType element_type() const { return dtype; }
  VK_HOST_DEVICE int64_t num_queries() const { return query_size[0] * query_size[1] * query_size[2]; }
  VK_HOST_DEVICE int64_t num_keys() const { return key_size[0] * key_size[1] * key_size[2]; }
  VK_HOST_DEVICE int64_t num_tiles() const { return axis[0].count * axis[1].count * axis[2].count; }
  VK_HOST_DEVICE int64_t max_queries() const { return axis[0].max_queries * axis[1].max_queries * axis[2].max_queries; }
  VK_HOST_DEVICE int64_t max_keys() const { return axis[0].max_keys * axis[1].max_keys * axis[2].max_keys; }
  VK_HOST_DEVICE MapTensor key_bias() const {
    const auto& [batch, head, query, key] = score.key_bias.strides;
    const int64_t* outer = score.key_bias_axis_stride;
    return {const_cast<void*>(score.key_bias.data), batch, {outer[0], outer[1], key}, head};
  }

  // The index of a query in [batch, *map].
  VK_HOST_DEVICE int64_t row(int64_t batch, const Coord& coord) const {
    return ((batch * query_size[0] + coord.at[0]) * query_size[1] + coord.at[1]) * query_size[2] + coord.at[2];
  }
};

// The tokens of a gradient that a split adds to. A split owns tokens from the previous split's end up to the last one
// that it touches, the last split also the rest; what it adds to earlier tokens goes to a private partial sum.
struct SplitTokens {
  Range owned, shared;
  int64_t first_row = 0;  // of the shared tokens among all parts
};

// Partial sums in float or double of a gradient [batch, *map, heads, dim]; also Params of the kernel that adds them.
struct MapPartialSums {
  DType dtype = DType::kFloat32;  // of the gradient
  MapTensor gradient;
  MapTensor owned;                        // [batch, *map, heads, width]; may be the gradient itself
  void* parts = nullptr;                  // for each split [batch, heads, shared tokens, width]
  const SplitTokens* of_split = nullptr;  // [splits]
  int64_t splits = 1, batch = 0, heads = 0, size[kMaxAxes] = {1, 1, 1}, dim = 0, width = 0;  // width: whole vectors

  DType element_type() const { return dtype; }
  bool are_wanted() const { return owned.data; }
  int64_t num_lines() const { return batch * heads * size[0] * size[1]; }  // along the last axis

  template <class T>
  T* part(int64_t split, int64_t of_batch, int64_t head) const {
    const SplitTokens& tokens = of_split[split];
    const int64_t rows = tokens.shared.end - tokens.shared.begin;
    return static_cast<T*>(parts) + (tokens.first_row * batch * heads + (of_batch * heads + head) * rows) * width;
  }
};

// The backward is partitioned by shapes alone: into groups of batches, kv heads, and `splits` ranges of query tiles. A
// task writes the query gradients of its tiles. Gradients that several tasks add to have partial sums, which are added
// in order.
struct SpatialBackwardParams {
  SpatialParams forward;
  MapTensor grad_out, grad_query, grad_key, grad_value;
  const void* grad_lse = nullptr;  // as lse, or null
  int64_t batch_groups = 1, splits = 1;
  MapPartialSums key_sums, value_sums;  // none if every key is in one tile, which writes its gradient
  MapPartialSums query_sums;            // of a shared query, whose tokens are a window's
  double* head_scale_sums = nullptr;    // [parts, heads], zero at first, or null; parts are batch_groups * splits
  double *key_fill_sums = nullptr, *value_fill_sums = nullptr;  // [parts, kv_heads, dim], likewise

  DType element_type() const { return forward.element_type(); }
  int64_t num_tasks() const { return batch_groups * forward.kv_heads * splits; }
};

}  // namespace vitkernels
