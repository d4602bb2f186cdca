// A tile of a map on the CPU: its tokens, where they lie on the map, and which keys each query sees.
#pragma once

#include "attention/cpu/forward_tile.h"
#include "attention/spatial.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// Tokens in row-major order, `step` apart. They may lie outside the map.
struct Box {
  int64_t first[kMaxAxes] = {}, size[kMaxAxes] = {}, step[kMaxAxes] = {1, 1, 1};

  int64_t count() const { return size[0] * size[1] * size[2]; }

  // The coordinates of a token within the box.
  Coord index(int64_t token) const {
    const int64_t row = token / size[2];
    return {{row / size[1], row % size[1], token % size[2]}};
  }
  Coord on_map(const Coord& index) const {
    return {{first[0] + index.at[0] * step[0], first[1] + index.at[1] * step[1], first[2] + index.at[2] * step[2]}};
  }

  // Calls f(token, count, index) for runs of `tokens` that differ in the last coordinate only.
  template <class Function>
  VK_INLINE void for_each_line(Range tokens, Function&& f) const {
    if (tokens.empty()) return;
    Coord at = tokens.begin == 0 ? Coord{} : index(tokens.begin);  // divisions are slow
    for (int64_t token = tokens.begin; token < tokens.end;) {
      const int64_t count = std::min(size[2] - at.at[2], tokens.end - token);
      f(token, count, at);
      token += count;
      at.at[2] = 0;
      if (++at.at[1] == size[1]) at.at[1] = 0, ++at.at[0];
    }
  }

  // Likewise, for the part of each run inside the map.
  template <class Function>
  VK_INLINE void for_each_line_on(const int64_t (&map)[kMaxAxes], Range tokens, Function&& f) const {
    const Range inside[] = {on_map(0, map[0]), on_map(1, map[1]), on_map(2, map[2])};
    for_each_line(tokens, [&](int64_t token, int64_t count, Coord at) VK_BODY {
      if (!inside[0].contains(at.at[0]) || !inside[1].contains(at.at[1])) return;
      const Range on_line = intersect(inside[2], {at.at[2], at.at[2] + count});
      token += on_line.begin - at.at[2], at.at[2] = on_line.begin;
      if (!on_line.empty()) f(token, on_line.end - on_line.begin, at);
    });
  }

  bool is_on(const int64_t (&map)[kMaxAxes]) const {
    bool is_inside = true;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const int64_t last = first[axis] + (size[axis] - 1) * step[axis];
      is_inside = is_inside && first[axis] >= 0 && last < map[axis];
    }
    return is_inside;
  }

  bool operator==(const Box&) const = default;

  // The range of indices on one axis inside the map.
  Range on_map(int axis, int64_t map_size) const {
    const int64_t last = first[axis] + (size[axis] - 1) * step[axis];
    if (first[axis] >= 0 && last < map_size) return {0, size[axis]};
    const int64_t before = first[axis] < 0 ? divide_up(-first[axis], step[axis]) : 0;
    const int64_t end = first[axis] < map_size ? divide_up(map_size - first[axis], step[axis]) : 0;
    return {before, std::min(end, size[axis])};
  }
};

// Which keys the queries of a tile see. Tiles of the same geometry share it.
struct TileView {
  const SeenKeys* seen[kMaxAxes];
  int64_t queries[kMaxAxes], keys[kMaxAxes];

  Coord query(int64_t row) const {
    const int64_t line = row / queries[2];
    return {{line / queries[1], line % queries[1], row % queries[2]}};
  }
  // Where a query is, counted from the first key of the tile.
  Coord coord(const Coord& query) const {
    return {{seen[0][query.at[0]].coord, seen[1][query.at[1]].coord, seen[2][query.at[2]].coord}};
  }

  // Calls f(column, count, key) for the runs of keys that a query sees within `columns`.
  template <class Function>
  VK_INLINE void for_each_line(const Coord& query, Range columns, Function&& f) const {
    const Range a = seen[0][query.at[0]].keys, b = seen[1][query.at[1]].keys, c = seen[2][query.at[2]].keys;
    for (int64_t i = a.begin; i < a.end; ++i) {
      for (int64_t j = b.begin; j < b.end; ++j) {
        const int64_t line = (i * keys[1] + j) * keys[2];
        const Range run = intersect({line + c.begin, line + c.end}, columns);
        if (!run.empty()) f(run.begin, run.end - run.begin, Coord{{i, j, run.begin - line}});
      }
    }
  }
};

// Where the tokens of a tile lie.
struct TileBoxes {
  const AxisTile* on_axis[kMaxAxes] = {};
  Box queries;  // in the query tensor
  Box outputs;  // in the map of the output, where a shared query is in all windows
  Box keys;     // in the key map
};

// The current tile of a task. Tiles of equal geometry have equal masks.
class SpatialTile : public TileBoxes {
 public:
  SpatialTile(const SpatialParams& params, Scratch& scratch) : p(params), seen(scratch.take<Range>(p.max_queries())) {}

  TileBoxes boxes_of(int64_t index) const {
    TileBoxes boxes;
    for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
      const AxisTiles& tiles = p.axis[axis];
      const AxisTile& on_axis = tiles.tile[index % tiles.count];
      index /= tiles.count;
      boxes.on_axis[axis] = &on_axis;
      boxes.outputs.first[axis] = on_axis.first_query, boxes.outputs.size[axis] = on_axis.num_queries;
      boxes.keys.first[axis] = on_axis.first_key, boxes.keys.size[axis] = on_axis.num_keys;
      boxes.outputs.step[axis] = boxes.keys.step[axis] = tiles.step;
    }
    boxes.queries = boxes.outputs;
    if (p.is_shared_query) std::fill_n(boxes.queries.first, kMaxAxes, 0);
    return boxes;
  }

  void start(const TileBoxes& boxes) {
    static_cast<TileBoxes&>(*this) = boxes;
    int64_t combined = 0;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      combined = combined * p.axis[axis].num_geometries + on_axis[axis]->geometry;
    }
    if (combined == geometry) return;
    geometry = combined;
    find_seen();
  }

  // The columns between the first and the last key that a query sees.
  Range seen_by(int64_t row) const { return seen[row]; }
  Range seen_by_any(Range rows) const {
    Range any{std::numeric_limits<int64_t>::max(), 0};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (seen[row].empty()) continue;
      any = {std::min(any.begin, seen[row].begin), std::max(any.end, seen[row].end)};
    }
    return any;
  }

  TileView view() const {
    return {{on_axis[0]->seen, on_axis[1]->seen, on_axis[2]->seen},
            {queries.size[0], queries.size[1], queries.size[2]},
            {keys.size[0], keys.size[1], keys.size[2]}};
  }
  // Where the queries are on an axis, counted from the first key.
  Range coords(int axis) const {
    return {on_axis[axis]->seen[0].coord, on_axis[axis]->seen[queries.size[axis] - 1].coord + 1};
  }

  int64_t geometry = -1;
  bool sees_all = false;   // every query sees every key, but for the radius
  bool has_holes = false;  // a query does not see all keys between its first and its last

 private:
  void find_seen() {
    // The keys between are contiguous if all axes behind the first one with several keys are seen whole.
    int outer = 0;
    while (outer < kMaxAxes - 1 && keys.size[outer] == 1) ++outer;
    has_holes = p.radius > 0;
    sees_all = true;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      sees_all = sees_all && on_axis[axis]->sees_all;
      has_holes = has_holes || (axis != outer && !on_axis[axis]->sees_all);
    }
    if (sees_all) {
      std::fill_n(seen, queries.count(), Range{0, keys.count()});
      return;
    }
    int64_t row = 0;
    for (int64_t i = 0; i < queries.size[0]; ++i) {
      for (int64_t j = 0; j < queries.size[1]; ++j) {
        for (int64_t k = 0; k < queries.size[2]; ++k) {
          const Range a = on_axis[0]->seen[i].keys, b = on_axis[1]->seen[j].keys, c = on_axis[2]->seen[k].keys;
          const bool is_empty = a.empty() || b.empty() || c.empty();
          const int64_t first = (a.begin * keys.size[1] + b.begin) * keys.size[2] + c.begin;
          const int64_t last = ((a.end - 1) * keys.size[1] + b.end - 1) * keys.size[2] + c.end - 1;
          seen[row++] = is_empty ? Range{0, 0} : Range{first, last + 1};
        }
      }
    }
  }

  const SpatialParams& p;
  Range* seen;  // [queries]
};

}  // namespace vitkernels::VK_ISA
