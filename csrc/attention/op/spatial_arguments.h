// From the tensors of an attention over maps to the Params of its kernels, with all checks.
#pragma once

#include "attention/op/arguments.h"
#include "attention/spatial_tiles.h"
#include "attention/unit_rows.h"

namespace vitkernels {

MapTensor map_tensor(const Tensor& t, int axes);

// A tensor that is broadcast to (B, heads, *map).
MapTensor key_bias_tensor(const Tensor& term, int axes);

// Of queries or keys, without a result.
UnitRowsParams unit_rows_params(const Tensor& rows, DType dtype);

// Owns what Params points to.
class SpatialArguments {
 public:
  SpatialArguments(const Checker& checker, SpatialCall call, const DevicePolicy& policy = {});

  void fill(SpatialParams& params) const;
  std::vector<int64_t> out_sizes() const;  // [B, *map, heads, dv]
  std::vector<int64_t> lse_sizes() const;
  bool is_empty() const;  // there are no queries

  // Queries and keys as most kernels take them, if `qk_norm` is set; `launch(params)` runs the kernel.
  template <class Launch>
  void normalize(Launch&& launch) {
    if (!qk_norm || is_empty()) return;
    for (Tensor* rows : {&query, &key}) {
      const Tensor units = empty_as(*rows);
      UnitRowsParams params = unit_rows_params(*rows, dtype);
      params.units = units.mutable_data_ptr();
      launch(params);
      *rows = units;
    }
  }

  int axes;
  Tensor query, key, value;
  ScoreArguments score;
  OffsetScore tables;
  DType dtype;
  bool is_shared_query, qk_norm;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  SpatialPattern pattern;
  std::vector<TiledAxis> tiled_axes;  // kMaxAxes of them, including axes that the map lacks

 private:
  void check_tokens(const Checker& checker);
  void check_axes(const Checker& checker, const std::vector<int64_t>& integers);
  void check_rule(const Checker& checker, int axis, const AxisRule& rule) const;
  void check_shared_query(const Checker& checker) const;
  void check_fill(const Checker& checker, const char* name, OptionalTensor& fill, int64_t dim) const;
  void tile(const Checker& checker);

  std::vector<int64_t> query_map, key_map;  // the map's sizes
  HeadMap heads_of;
};

}  // namespace vitkernels
