// Coordinates of tokens on a grid, and tables by the offset between two of them. Host and device, no torch.
//
// A table has an entry for every offset of a query from a key: (2 n0 - 1, 2 n1 - 1, 2 n2 - 1). Query i and key j use
// entry (i0 - j0 + n0 - 1, i1 - j1 + n1 - 1, i2 - j2 + n2 - 1). The CPU reads the table in reverse order, in which
// consecutive keys on the last axis have consecutive entries.
#pragma once

#include "attention/pattern.h"
#include "common/divisor.h"

namespace vitkernels {

struct Coord {
  int64_t at[kMaxAxes];
};

struct OffsetGrid {
  int64_t size[kMaxAxes] = {1, 1, 1};  // depth, height, width; with fewer axes, the last ones
  int64_t num_prefix = 0;              // leading tokens outside the grid, such as a class token

  VK_HOST_DEVICE int64_t num_tokens() const { return size[0] * size[1] * size[2]; }
  VK_HOST_DEVICE int64_t num_offsets(int axis) const { return 2 * size[axis] - 1; }
  VK_HOST_DEVICE int64_t num_entries() const { return num_offsets(0) * num_offsets(1) * num_offsets(2); }

  // Here and below, tokens are counted from the first one on the grid.
  VK_HOST_DEVICE Coord coord(int64_t token) const {
    const int64_t row = token / size[2];
    return {{row / size[1], row % size[1], token % size[2]}};
  }

  // In the reversed table, the entry of a query and a key is key_entry(key) + query_entry(query).
  VK_HOST_DEVICE int64_t key_entry(const Coord& key) const {
    return (key.at[0] * num_offsets(1) + key.at[1]) * num_offsets(2) + key.at[2];
  }
  VK_HOST_DEVICE int64_t query_entry(const Coord& query) const {
    return key_entry({{first_entry(0, query), first_entry(1, query), first_entry(2, query)}});
  }

  // The range of coordinates of consecutive tokens on one axis.
  VK_HOST_DEVICE Range coordinates(int axis, Range tokens) const {
    int64_t inner = 1;
    for (int later = axis + 1; later < kMaxAxes; ++later) inner *= size[later];
    const int64_t first = tokens.begin / inner, last = (tokens.end - 1) / inner;
    if (first / size[axis] != last / size[axis]) return {0, size[axis]};
    return {first % size[axis], last % size[axis] + 1};
  }

  // The entries of one axis' reversed table that pairs of these tokens use. A pair's entry is
  // key.at[axis] + first_entry(axis, query).
  VK_HOST_DEVICE Range entries(int axis, Range queries, Range keys) const {
    const Range u = coordinates(axis, queries), v = coordinates(axis, keys);
    return {v.begin + size[axis] - u.end, v.end - 1 + size[axis] - u.begin};
  }
  VK_HOST_DEVICE int64_t first_entry(int axis, const Coord& query) const { return size[axis] - 1 - query.at[axis]; }

  // Calls f(token, count, coord) for runs of consecutive tokens that differ in the last coordinate only.
  template <class Function>
  VK_HOST_DEVICE void for_each_run(Range tokens, Function&& f) const {
    if (tokens.empty()) return;
    Coord first = coord(tokens.begin);
    for (int64_t token = tokens.begin; token < tokens.end;) {
      const int64_t rest = size[2] - first.at[2], left = tokens.end - token, count = rest < left ? rest : left;
      f(token, count, first);
      token += count;
      first.at[2] = 0;
      if (++first.at[1] == size[1]) first.at[1] = 0, ++first.at[0];
    }
  }
};

// The same grid for GPUs, which have no integer division instruction; 32 bits are enough for its tokens and entries. A
// table is read as given: the entry of a query and a key is entry(query) - entry(key) + center().
struct DeviceOffsetGrid {
  static constexpr int64_t kMaxEntries = (int64_t(1) << 31) - 1;

  int size[kMaxAxes] = {1, 1, 1}, num_prefix = 0;
  Divisor height, width;

  struct Coord {
    int at[kMaxAxes];
  };

  DeviceOffsetGrid() = default;
  explicit DeviceOffsetGrid(const OffsetGrid& grid)
      : size{int(grid.size[0]), int(grid.size[1]), int(grid.size[2])},
        num_prefix(int(grid.num_prefix)),
        height(size[1]),
        width(size[2]) {}

  VK_HOST_DEVICE Coord coord(int token) const {
    const int row = width.divide(token), depth = height.divide(row);
    return {{depth, row - depth * size[1], token - row * size[2]}};
  }
  // For an axis that is not known at compile time: an indexed array would be in local memory.
  VK_HOST_DEVICE int coordinate(int axis, int token) const {
    const Coord p = coord(token);
    return axis == 0 ? p.at[0] : axis == 1 ? p.at[1] : p.at[2];
  }
  VK_HOST_DEVICE int num_offsets(int axis) const { return 2 * size[axis] - 1; }
  VK_HOST_DEVICE int entry(const Coord& p) const {
    return (p.at[0] * num_offsets(1) + p.at[1]) * num_offsets(2) + p.at[2];
  }
  VK_HOST_DEVICE int center() const { return entry({{size[0] - 1, size[1] - 1, size[2] - 1}}); }
};

}  // namespace vitkernels
