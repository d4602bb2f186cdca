// Score terms of a tile of a map on the CPU. What depends on the geometry and the head alone, the mask and the tables, is
// expanded once for all tiles that have them in common.
#pragma once

#include "attention/spatial_tile_cpu.h"

namespace vitkernels::VK_ISA {

// What is added to, and multiplied with, the logits of a tile: rows of queries, columns of keys.
template <class T>
struct ExpandedTile {
  int64_t geometry = -1, head = -1;
  Range rows{}, columns{};
  T *bias = nullptr, *multiplier = nullptr;  // [rows, stride]; a bias of minus infinity hides a key
};

template <class T>
class ExpandedTiles {
 public:
  ExpandedTiles(const SpatialParams& params, int64_t most_rows, int64_t most_columns, Scratch& scratch)
      : p(params), grid(p.score.on_grid.grid), stride(round_up(most_columns, kWidth<T>)) {
    constexpr int64_t kMemory = 768 << 10;
    const bool has_multiplier = p.score.on_grid.multiplier.data;
    const int64_t elements = most_rows * stride;
    const int64_t fitting = kMemory / (elements * int64_t(sizeof(T)) * (has_multiplier ? 2 : 1) + 1);
    const int64_t geometries = p.axis[0].num_geometries * p.axis[1].num_geometries * p.axis[2].num_geometries;
    num_slots = std::clamp<int64_t>(std::min(geometries, fitting), 1, kMostSlots);
    for (int64_t i = 0; i < num_slots; ++i) {
      slots[i].bias = scratch.take<T>(elements);
      if (has_multiplier) slots[i].multiplier = scratch.take<T>(elements);
    }
  }

  const ExpandedTile<T>& of(const SpatialTile& tile, int64_t head, Range rows, Range columns) {
    const GridTerms& terms = p.score.on_grid;
    if (!terms.multiplier.data && !terms.bias.data) head = 0;  // the mask is every head's
    ExpandedTile<T>& slot = slots[tile.geometry % num_slots];
    const bool is_same = slot.geometry == tile.geometry && slot.head == head && slot.rows.begin == rows.begin &&
                         slot.columns.begin == columns.begin;
    if (!is_same) {
      slot.geometry = tile.geometry, slot.head = head, slot.rows = rows, slot.columns = columns;
      expand(tile, slot);
    }
    return slot;
  }

 private:
  static constexpr int64_t kMostSlots = 32;

  void expand(const SpatialTile& tile, const ExpandedTile<T>& slot) const {
    const int64_t count = slot.columns.end - slot.columns.begin;
    for (int64_t row = slot.rows.begin; row < slot.rows.end; ++row) {
      const int64_t at = (row - slot.rows.begin) * stride;
      std::fill_n(slot.bias + at, round_up(count, kWidth<T>), kMinusInfinity<T>);
      if (slot.multiplier) std::fill_n(slot.multiplier + at, round_up(count, kWidth<T>), T(1));
      expand_row(tile, slot, tile.queries.index(row), at - slot.columns.begin);
    }
  }

  // One query's; column c of the tile is element `first` + c.
  void expand_row(const SpatialTile& tile, const ExpandedTile<T>& slot, const Place& query, int64_t first) const {
    const SeenKeys &a = tile.on_axis(0, query), &b = tile.on_axis(1, query), &c = tile.on_axis(2, query);
    const Place place{{a.place, b.place, c.place}};
    const int64_t query_entry = grid.query_entry(place);
    const T *bias = table(p.score.on_grid.bias, slot.head), *multiplier = table(p.score.on_grid.multiplier, slot.head);
    for (int64_t i = a.keys.begin; i < a.keys.end; ++i) {
      for (int64_t j = b.keys.begin; j < b.keys.end; ++j) {
        const int64_t line = (i * tile.keys.size[1] + j) * tile.keys.size[2];
        const Range seen = intersect({line + c.keys.begin, line + c.keys.end}, slot.columns);
        if (seen.empty()) continue;
        const int64_t entry = query_entry + grid.key_entry({{i, j, seen.begin - line}});
        T* to = slot.bias + first + seen.begin;
        const int64_t count = seen.end - seen.begin;
        if (bias) {
          std::copy_n(bias + entry, count, to);
        } else {
          std::fill_n(to, count, T(0));
        }
        if (multiplier) std::copy_n(multiplier + entry, count, slot.multiplier + first + seen.begin);
        if (p.radius > 0) hide_distant(to, count, place, {{i, j, seen.begin - line}});
      }
    }
  }

  void hide_distant(T* bias, int64_t count, const Place& query, const Place& key) const {
    double outer = 0;
    const auto squared = [&](int axis, int64_t at) {
      const double distance = double((query.at[axis] - at) * p.axis[axis].step);
      return distance * distance;
    };
    for (int axis = 0; axis < kMaxAxes - 1; ++axis) outer += squared(axis, key.at[axis]);
    for (int64_t i = 0; i < count; ++i) {
      const double distance = outer + squared(kMaxAxes - 1, key.at[kMaxAxes - 1] + i);
      if (distance > p.radius * p.radius) bias[i] = kMinusInfinity<T>;
    }
  }

  static const T* table(const TableTerm& term, int64_t head) {
    return term.data ? static_cast<const T*>(term.data) + head * term.head_stride : nullptr;
  }

  const SpatialParams& p;
  const Grid& grid;

 public:
  const int64_t stride;

 private:
  int64_t num_slots;
  ExpandedTile<T> slots[kMostSlots];
};

}  // namespace vitkernels::VK_ISA
