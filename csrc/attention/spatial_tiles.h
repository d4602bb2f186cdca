// Partitions a map into query tiles, by shapes alone, so that results are the same for any number of threads.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "attention/spatial.h"

namespace vitkernels {

// The tiles of one axis, one residue class after the other.
class TiledAxis {
 public:
  // At most `max_queries` per tile, unless the rule fixes their number.
  TiledAxis(const AxisRule& rule, int64_t max_queries);
  TiledAxis(const TiledAxis&) = delete;
  TiledAxis(TiledAxis&&) = default;

  AxisTiles view() const;

  int64_t largest_offset = 0;    // of a query from a key that it sees
  bool covers_keys_once = true;  // every key of the map is in exactly one tile's box

 private:
  void add_class(const AxisRule& rule, int64_t first, int64_t step, int64_t max_queries);
  void add_tile(const AxisRule& rule, Range queries, int64_t first, int64_t step);

  std::vector<AxisTile> tiles;
  std::map<std::vector<std::array<int64_t, 3>>, std::vector<SeenKeys>> geometries;
  std::map<const SeenKeys*, int64_t> numbers;
  int64_t step;
};

// The extents of a query tile on each axis that minimize the estimated work.
std::array<int64_t, kMaxAxes> tile_extents(const SpatialPattern& pattern);

}  // namespace vitkernels
