// A tile of a map on the CPU: which tokens it has, where they lie in memory, and which keys each of its queries sees.
#pragma once

#include "attention/forward_tile_cpu.h"
#include "attention/spatial.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// Tokens in row-major order, `step` apart on the map, beyond which they may lie.
struct Box {
  int64_t first[kMaxAxes], size[kMaxAxes], step[kMaxAxes];

  int64_t count() const { return size[0] * size[1] * size[2]; }

  // Of a token, counted from the box's first one.
  Place index(int64_t token) const {
    const int64_t row = token / size[2];
    return {{row / size[1], row % size[1], token % size[2]}};
  }
  Place on_map(const Place& index) const {
    return {{first[0] + index.at[0] * step[0], first[1] + index.at[1] * step[1], first[2] + index.at[2] * step[2]}};
  }

  // Calls f(token, count, index) for the stretches of `tokens` that differ on the last axis only.
  template <class Function>
  void for_each_line(Range tokens, Function&& f) const {
    if (tokens.empty()) return;
    Place at = index(tokens.begin);
    for (int64_t token = tokens.begin; token < tokens.end;) {
      const int64_t count = std::min(size[2] - at.at[2], tokens.end - token);
      f(token, count, at);
      token += count;
      at.at[2] = 0;
      if (++at.at[1] == size[1]) at.at[1] = 0, ++at.at[0];
    }
  }

  // The indices on one axis that lie on a map.
  Range on_map(int axis, int64_t map_size) const {
    const int64_t before = first[axis] < 0 ? divide_up(-first[axis], step[axis]) : 0;
    const int64_t end = first[axis] < map_size ? divide_up(map_size - first[axis], step[axis]) : 0;
    return {before, std::min(end, size[axis])};
  }

  // Whether the tokens of the whole box are evenly spaced in a tensor: then `spacing` elements apart.
  bool is_even(const MapTensor& t, int64_t& spacing) const {
    spacing = 0;
    int64_t inner = 1;
    for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
      if (size[axis] == 1) continue;
      const int64_t stride = t.axis_stride[axis] * step[axis];
      if (inner == 1) spacing = stride;
      if (stride != inner * spacing) return false;
      inner *= size[axis];
    }
    return true;
  }
};

// Which keys the queries of a tile see. It outlives the tile: other tiles of the same geometry have the same one.
struct TileView {
  const SeenKeys* seen[kMaxAxes];
  int64_t queries[kMaxAxes], keys[kMaxAxes];

  Place query(int64_t row) const {
    const int64_t line = row / queries[2];
    return {{line / queries[1], line % queries[1], row % queries[2]}};
  }
  // Where a query is, counted from the first key of the tile.
  Place place(const Place& query) const {
    return {{seen[0][query.at[0]].place, seen[1][query.at[1]].place, seen[2][query.at[2]].place}};
  }

  // Calls f(column, count, key) for the stretches of keys that a query sees among `columns`.
  template <class Function>
  VK_INLINE void for_each_line(const Place& query, Range columns, Function&& f) const {
    const Range a = seen[0][query.at[0]].keys, b = seen[1][query.at[1]].keys, c = seen[2][query.at[2]].keys;
    for (int64_t i = a.begin; i < a.end; ++i) {
      for (int64_t j = b.begin; j < b.end; ++j) {
        const int64_t line = (i * keys[1] + j) * keys[2];
        const Range stretch = intersect({line + c.begin, line + c.end}, columns);
        if (!stretch.empty()) f(stretch.begin, stretch.end - stretch.begin, Place{{i, j, stretch.begin - line}});
      }
    }
  }
};

// A tile, the task's work. Tiles of equal geometry see their keys alike.
class SpatialTile {
 public:
  SpatialTile(const SpatialParams& params, Scratch& scratch) : p(params), seen(scratch.take<Range>(p.most_queries())) {}

  void start(int64_t index) {
    const AxisTile* of_axis[kMaxAxes];
    for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
      const AxisTiles& tiles = p.axis[axis];
      of_axis[axis] = &tiles.tile[index % tiles.count];
      index /= tiles.count;
    }
    int64_t combined = 0;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const AxisTile& tile = *of_axis[axis];
      queries.first[axis] = p.is_shared_query ? 0 : tile.first_query;
      queries.size[axis] = tile.num_queries;
      first_output[axis] = tile.first_query;
      keys.first[axis] = tile.first_key, keys.size[axis] = tile.num_keys;
      queries.step[axis] = keys.step[axis] = p.axis[axis].step;
      combined = combined * p.axis[axis].num_geometries + tile.geometry;
    }
    if (combined == geometry) return;
    geometry = combined;
    for (int axis = 0; axis < kMaxAxes; ++axis) axes[axis] = of_axis[axis];
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
    return {{axes[0]->seen, axes[1]->seen, axes[2]->seen},
            {queries.size[0], queries.size[1], queries.size[2]},
            {keys.size[0], keys.size[1], keys.size[2]}};
  }
  // Where the queries are on an axis, counted from the first key.
  Range places(int axis) const {
    return {axes[axis]->seen[0].place, axes[axis]->seen[queries.size[axis] - 1].place + 1};
  }

  int64_t geometry = -1;
  bool has_holes = false;  // a query does not see all keys between its first and its last
  Box queries, keys;       // in the query tensor; in the key map

  // The queries in the map of the output: a shared query is in all windows.
  Box outputs() const {
    Box box = queries;
    std::copy_n(first_output, kMaxAxes, box.first);
    return box;
  }

 private:
  void find_seen() {
    // What lies between is whole on all axes but the first that has more than one key.
    int outer = 0;
    while (outer < kMaxAxes - 1 && keys.size[outer] == 1) ++outer;
    has_holes = p.radius > 0;
    for (int axis = 0; axis < kMaxAxes; ++axis) has_holes = has_holes || (axis != outer && !axes[axis]->sees_all);

    int64_t row = 0;
    for (int64_t i = 0; i < queries.size[0]; ++i) {
      for (int64_t j = 0; j < queries.size[1]; ++j) {
        for (int64_t k = 0; k < queries.size[2]; ++k) {
          const Range a = axes[0]->seen[i].keys, b = axes[1]->seen[j].keys, c = axes[2]->seen[k].keys;
          const bool is_empty = a.empty() || b.empty() || c.empty();
          const int64_t first = (a.begin * keys.size[1] + b.begin) * keys.size[2] + c.begin;
          const int64_t last = ((a.end - 1) * keys.size[1] + b.end - 1) * keys.size[2] + c.end - 1;
          seen[row++] = is_empty ? Range{0, 0} : Range{first, last + 1};
        }
      }
    }
  }

  const SpatialParams& p;
  const AxisTile* axes[kMaxAxes] = {};
  int64_t first_output[kMaxAxes] = {};
  Range* seen;  // [queries]
};

// Rows of a box as the packing wants them: where they are if they are evenly spaced, else copied together.
template <class S>
class BoxRows {
 public:
  BoxRows(int64_t most_rows, int64_t dim, Scratch& scratch) : dim(dim), copies(scratch.take<S>(most_rows * dim)) {}

  // Tokens of a box on the map.
  TensorRows<S> of(const MapTensor& t, int64_t batch, int64_t head, const Box& box, Range tokens) {
    int64_t spacing;
    if (box.is_even(t, spacing)) {
      return {t.at<const S>(batch, box.on_map(box.index(tokens.begin)), head), spacing};
    }
    const int64_t step = t.axis_stride[kLast] * box.step[kLast];
    S* to = copies;
    box.for_each_line(tokens, [&](int64_t, int64_t count, const Place& index) {
      copy(t.at<const S>(batch, box.on_map(index), head), step, count, to);
      to += count * dim;
    });
    return {copies, dim};
  }

  // Those beyond the map, whose sizes are given, are `fill`, or zero where it is null.
  TensorRows<S> of(const MapTensor& t, int64_t batch, int64_t head, const Box& box, Range tokens,
                   const int64_t (&map)[kMaxAxes], const S* fill) {
    bool is_inside = true;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const Range inside = box.on_map(axis, map[axis]);
      is_inside = is_inside && inside.begin == 0 && inside.end == box.size[axis];
    }
    if (is_inside) return of(t, batch, head, box, tokens);
    const int64_t step = t.axis_stride[kLast] * box.step[kLast];
    const Range inside_line = box.on_map(kLast, map[kLast]);
    S* to = copies;
    box.for_each_line(tokens, [&](int64_t, int64_t count, const Place& index) {
      Range inside = intersect(inside_line, {index.at[kLast], index.at[kLast] + count});
      for (int axis = 0; axis < kLast; ++axis) {
        if (!box.on_map(axis, map[axis]).contains(index.at[axis])) inside = {0, 0};
      }
      if (inside.empty()) inside = {index.at[kLast], index.at[kLast]};
      repeat(fill, inside.begin - index.at[kLast], to);
      if (!inside.empty()) {
        copy(t.at<const S>(batch, box.on_map({{index.at[0], index.at[1], inside.begin}}), head), step,
             inside.end - inside.begin, to + (inside.begin - index.at[kLast]) * dim);
      }
      repeat(fill, index.at[kLast] + count - inside.end, to + (inside.end - index.at[kLast]) * dim);
      to += count * dim;
    });
    return {copies, dim};
  }

 private:
  static constexpr int kLast = kMaxAxes - 1;

  void copy(const S* from, int64_t stride, int64_t count, S* to) const {
    constexpr int64_t kElements = kVectorBytes / sizeof(S);
    for (int64_t i = 0; i < count; ++i, from += stride, to += dim) {
      int64_t c = 0;
      for (; c + kElements <= dim; c += kElements) std::memcpy(to + c, from + c, kVectorBytes);
      if (c < dim) std::memcpy(to + c, from + c, (dim - c) * sizeof(S));
    }
  }
  void repeat(const S* fill, int64_t count, S* to) const {
    if (!fill) return clear(to, {0, count * dim});
    copy(fill, 0, count, to);
  }

  const int64_t dim;
  S* copies;
};

}  // namespace vitkernels::VK_ISA
