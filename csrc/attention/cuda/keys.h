// Which keys a tile of queries sees. Attention kernels are templates over this.
#pragma once

#include "attention/dense.h"
#include "cuda/scheduler.h"

namespace vitkernels::cuda {

// A contiguous range of keys for each query, whose ends grow with the query.
struct DenseKeys {
  Axis axis;

  static __device__ DenseKeys of(const Sequence& sequence) { return {sequence.axis}; }

  // The KV tiles, of `size` keys, that hold a key which one of the queries sees.
  __device__ Range tiles(Range queries, int size) const {
    const Range seen = axis.any_keys(queries);
    return {seen.begin / size, ceil_div<int64_t>(seen.end, size)};
  }

  // The keys of a KV tile.
  __device__ Range rows(int64_t tile, int size) const { return tile_of(tile, size, axis.num_keys); }

  // The keys that one query sees.
  __device__ Range seen(int64_t query) const { return axis.keys(query); }

  // Whether one of the queries sees one of the keys; whether each sees all of them.
  __device__ bool is_visible(Range queries, Range keys) const {
    return !intersect(axis.any_keys(queries), keys).empty();
  }
  __device__ bool is_whole(Range queries, Range keys) const { return axis.all_keys(queries).end >= keys.end; }
};

}  // namespace vitkernels::cuda
