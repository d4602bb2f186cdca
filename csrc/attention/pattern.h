// Which keys a query sees. Host and device, no torch.
//
// A pattern is a product over axes of contiguous key ranges: a query with coordinates (u0, u1, ...) sees the keys
// whose coordinate on every axis lies in that axis' range. Each axis has a query grid and a key grid of its own.
// Kernels ask per tile: skip it, take it whole, or look at the range of every row.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace vitkernels {

struct Range {
  int64_t begin, end;

  VK_HOST_DEVICE bool empty() const { return begin >= end; }
};

VK_HOST_DEVICE Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// The range [r.begin - offset, r.end - offset): from the whole axis to the coordinates of a tile.
VK_HOST_DEVICE Range relative_to(Range r, int64_t offset) { return {r.begin - offset, r.end - offset}; }

struct Axis {
  int64_t num_queries = 1, num_keys = 1;
  bool is_causal = false;

  // Keys of query u: all of them, or those up to u (aligned at the first query and key).
  VK_HOST_DEVICE Range keys(int64_t u) const { return {0, is_causal && u + 1 < num_keys ? u + 1 : num_keys}; }

  // Keys that at least one of the queries in `u` sees. Both ends of a rule's range grow with u.
  VK_HOST_DEVICE Range any_keys(Range u) const { return {keys(u.begin).begin, keys(u.end - 1).end}; }

  // Keys that all of them see.
  VK_HOST_DEVICE Range all_keys(Range u) const { return {keys(u.end - 1).begin, keys(u.begin).end}; }
};

inline constexpr int kMaxAxes = 3;

struct Pattern {
  Axis axis[kMaxAxes];

  VK_HOST_DEVICE int64_t num_queries() const { return axis[0].num_queries * axis[1].num_queries * axis[2].num_queries; }
  VK_HOST_DEVICE int64_t num_keys() const { return axis[0].num_keys * axis[1].num_keys * axis[2].num_keys; }
};

}  // namespace vitkernels
