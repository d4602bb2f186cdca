// A range of integers, and the functions that host and device share.
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
  VK_HOST_DEVICE bool contains(int64_t i) const { return begin <= i && i < end; }
};

VK_HOST_DEVICE Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// From the whole axis to the coordinates of a tile.
VK_HOST_DEVICE Range relative_to(Range r, int64_t offset) { return {r.begin - offset, r.end - offset}; }

// The i-th of n shares, as even as possible.
VK_HOST_DEVICE Range share_of(Range r, int64_t i, int64_t n) {
  const int64_t count = r.end - r.begin;
  return {r.begin + count * i / n, r.begin + count * (i + 1) / n};
}

}  // namespace vitkernels
