// How a map is cut into tiles of queries. By shapes alone, so that results are the same for any number of threads.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "attention/spatial.h"

namespace vitkernels {

// The tiles of one axis, class by class.
class TiledAxis {
 public:
  // At most `most_queries` in a tile where the rule does not fix their number.
  TiledAxis(const AxisRule& rule, int64_t most_queries);
  TiledAxis(const TiledAxis&) = delete;
  TiledAxis(TiledAxis&&) = default;

  AxisTiles view() const;

  int64_t largest_offset = 0;    // of a query from a key that it sees
  bool covers_keys_once = true;  // every key of the map is in one tile's box and in no other

 private:
  void add_class(const AxisRule& rule, int64_t first, int64_t step, int64_t most_queries);
  void add_tile(const AxisRule& rule, Range queries, int64_t first, int64_t step);

  std::vector<AxisTile> tiles;
  std::map<std::vector<std::array<int64_t, 3>>, std::vector<SeenKeys>> geometries;
  std::map<const SeenKeys*, int64_t> numbers;
  int64_t step;
};

// The number of queries on each axis of a tile for which there is least to do.
std::array<int64_t, kMaxAxes> tile_extents(const SpatialPattern& pattern);

}  // namespace vitkernels
