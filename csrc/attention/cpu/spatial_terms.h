// Score terms of a tile of a map on the CPU.
#pragma once

#include "attention/cpu/expanded_tiles.h"

namespace vitkernels::VK_ISA {

// All terms along one row at a time.
template <class T>
class SpatialTerms {
 public:
  struct Sizes {
    int64_t max_rows, max_columns, max_logit_tiles, max_group;  // a group of rows is multiplied at once
    bool with_gradients;
  };

  SpatialTerms(const SpatialParams& params, const Sizes& sizes, Scratch& scratch)
      : p(params),
        expanded(p, sizes.max_rows, sizes.max_columns, sizes.max_logit_tiles, sizes.with_gradients, scratch),
        relative(terms, relative_sizes(sizes), scratch) {
    if (p.score.key_bias.data) key_bias = scratch.take<T>(expanded.max_stride);
    if (terms.has_rel_pos()) bias = scratch.take<T>(expanded.max_stride);
    if (!sizes.with_gradients) return;
    if (terms.has_rel_pos()) row_gradient = scratch.take<T>(expanded.max_stride);
    if (p.score.key_bias.grad) key_bias_gradient = scratch.take<T>(expanded.max_stride);
  }

  // Whether the logits of a tile are changed or masked.
  bool any_on(const SpatialTile& tile) const { return tile.has_holes || p.score.has_terms(); }

  // Before the logit tiles of some columns of a map tile.
  void start_columns(int64_t batch, int64_t head, const SpatialTile& of_tile, Range columns) {
    tile = &of_tile;
    if (!key_bias) return;
    const MapTensor bias_map = p.key_bias();
    const int64_t step = bias_map.axis_stride[kLast] * tile->keys.step[kLast];
    T* to = key_bias;
    const auto inside_on = [&](int axis) { return tile->keys.on_map(axis, p.key_size[axis]); };
    const Range inside[] = {inside_on(0), inside_on(1), inside_on(2)};
    tile->keys.for_each_line(columns, [&](int64_t, int64_t count, const Coord& first) {
      const bool on_map = inside[0].contains(first.at[0]) && inside[1].contains(first.at[1]);
      const T* from = bias_map.at<const T>(batch, tile->keys.on_map(first), head);
      for (int64_t i = 0; i < count; ++i) {
        to[i] = on_map && inside[kLast].contains(first.at[kLast] + i) ? from[i * step] : T(0);
      }
      to += count;
    });
    if (key_bias_gradient) std::fill_n(key_bias_gradient, columns.end - columns.begin, T(0));
  }

  void start_logit_tile(int64_t of_head, const LogitTile& of_logit_tile, int64_t part) {
    head = of_head, logit_tile = of_logit_tile;
    slot = &expanded.at(*tile, head, logit_tile, part);
    if (!terms.has_rel_pos()) return;
    const bool is_packed = packed_geometry == tile->geometry && packed_head == head;
    if (!is_packed) relative.pack(head, entries = tile_entries());
    packed_geometry = tile->geometry, packed_head = head;
  }

  // Before rows of the logit tile are read; `queries` are their rows.
  template <class Rows>
  void start_rows(Rows queries, Range rows) {
    first_row = rows.begin;
    if (terms.has_rel_pos()) relative.multiply(queries, rows.end - rows.begin, entries);
  }

  // The terms of a row, from a column of the logit tile on.
  ScoreRow<T> row(int64_t row, int64_t first_column) {
    const int64_t at = (row - logit_tile.rows.begin) * slot->stride;
    const T* added = slot->bias + at;
    if (terms.has_rel_pos()) {
      add_relative(row, added);
      added = bias;
    }
    return {slot->multiplier ? slot->multiplier + at + first_column : nullptr, added + first_column,
            key_bias ? key_bias + first_column : nullptr};
  }

  // Whether the terms reduce to a bias. Then these are the rows of it and of its gradient, or null.
  bool is_bias() const { return !slot->multiplier && !key_bias && !terms.has_rel_pos(); }
  BiasRow<T> bias_row(int64_t row, int64_t first_column) const {
    return {slot->bias + (row - logit_tile.rows.begin) * slot->stride + first_column};
  }
  int64_t bias_stride() const { return slot->stride; }
  T* bias_gradient_row(int64_t row, int64_t first_column) const {
    T* gradient = slot->bias_gradient;
    return gradient ? gradient + (row - logit_tile.rows.begin) * slot->stride + first_column : nullptr;
  }

  // Adds one vector of the gradient of that row.
  VK_INLINE void add_gradient(int64_t row, int64_t first_column, Vec<T> grad, Vec<T> product, int64_t column,
                              Range lanes) {
    const int64_t at = first_column + column, element = (row - logit_tile.rows.begin) * slot->stride + at;
    const Vec<T> inside = keep(grad, lanes, T(0));
    if (slot->bias_gradient) add_vector(slot->bias_gradient + element, inside);
    if (slot->multiplier_gradient) {
      add_vector(slot->multiplier_gradient + element, keep(grad * product, lanes, T(0)));
    }
    if (key_bias_gradient) add_vector(key_bias_gradient + at, inside);
    if (row_gradient) store(row_gradient + at, inside);
  }

  // After the last vector of a row.
  void finish_row(int64_t row) {
    if (!row_gradient) return;
    const TileView view = tile->view();
    const Coord query = view.query(row), coord = view.coord(query);
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      T* to = relative.gradient_row(axis, row - first_row, terms.grid.first_entry(axis, coord));
      if (!to) continue;
      view.for_each_line(query, logit_tile.columns, [&](int64_t column, int64_t count, const Coord& key) {
        const T* gradient = row_gradient + column - logit_tile.columns.begin;
        if (axis == kLast) {
          for (int64_t i = 0; i < count; ++i) to[key.at[kLast] + i] += gradient[i];
        } else {
          to[key.at[axis]] += sum_of(gradient, count);
        }
      });
    }
  }

  // After the last row of start_rows; `query_gradient` is that of its queries, without the scale.
  void finish_rows(int64_t part, T* query_gradient) const {
    if (terms.has_rel_pos()) relative.add_gradients(part, head, query_gradient);
  }

  void finish_logit_tile() { slot->num_sums += slot->bias_gradient != nullptr; }

  // After the last logit tile of the columns.
  void finish_columns(int64_t split, int64_t batch, int64_t of_head, Range columns) const {
    if (!key_bias_gradient) return;
    T* sums = static_cast<T*>(p.score.key_bias.grad) + ((split * p.batch + batch) * p.heads + of_head) * p.num_keys();
    const Range inside = tile->keys.on_map(kLast, p.key_size[kLast]);
    const T* from = key_bias_gradient;
    tile->keys.for_each_line(columns, [&](int64_t, int64_t count, const Coord& first) {
      bool on_map = true;
      for (int axis = 0; axis < kLast; ++axis) {
        on_map = on_map && tile->keys.on_map(axis, p.key_size[axis]).contains(first.at[axis]);
      }
      const Coord coord = tile->keys.on_map(first);
      T* to = sums + (coord.at[0] * p.key_size[1] + coord.at[1]) * p.key_size[2] + coord.at[2];
      for (int64_t i = 0; i < count; ++i) {
        if (on_map && inside.contains(first.at[kLast] + i)) to[i * tile->keys.step[kLast]] += from[i];
      }
      from += count;
    });
  }

  // After the last tile of a task.
  void finish(int64_t part) { expanded.flush(part); }

 private:
  static constexpr int kLast = kMaxAxes - 1;

  VK_INLINE static void add_vector(T* sums, Vec<T> v) { store(sums, load(sums) + v); }

  typename RelativeLogits<T>::Sizes relative_sizes(const Sizes& sizes) const {
    typename RelativeLogits<T>::Sizes result{p.head_dim, sizes.max_group, {}, sizes.with_gradients};
    for (int axis = 0; axis < kMaxAxes; ++axis) result.max_entries[axis] = terms.grid.num_offsets(axis);
    return result;
  }

  // The entries of all pairs of the tile. Offsets beyond the table belong to masked pairs.
  EntryRanges tile_entries() const {
    EntryRanges result;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const Range coords = tile->coords(axis);
      const int64_t size = terms.grid.size[axis];
      const Range all{0, terms.grid.num_offsets(axis)};
      result[axis] = intersect({size - coords.end, size - 1 - coords.begin + tile->keys.size[axis]}, all);
    }
    return result;
  }

  void add_relative(int64_t row, const T* added) {
    const TileView view = tile->view();
    const Coord query = view.query(row), coord = view.coord(query);
    std::copy_n(added, slot->stride, bias);
    const T* along[kMaxAxes];
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      along[axis] = relative.row(axis, row - first_row, terms.grid.first_entry(axis, coord));
    }
    view.for_each_line(query, logit_tile.columns, [&](int64_t column, int64_t count, const Coord& key) {
      T* to = bias + column - logit_tile.columns.begin;
      T same = 0;
      for (int axis = 0; axis < kLast; ++axis) {
        if (along[axis]) same += along[axis][key.at[axis]];
      }
      for (int64_t i = 0; i < count; ++i) to[i] += same + (along[kLast] ? along[kLast][key.at[kLast] + i] : T(0));
    });
  }

  const SpatialParams& p;
  const OffsetTerms& terms = p.score.by_offset;
  ExpandedTiles<T> expanded;
  RelativeLogits<T> relative;
  T *key_bias = nullptr, *bias = nullptr;                   // [columns] of a tile; of a row
  T *key_bias_gradient = nullptr, *row_gradient = nullptr;  // likewise
  const SpatialTile* tile = nullptr;
  ExpandedTile<T>* slot = nullptr;
  LogitTile logit_tile{};
  EntryRanges entries{};
  int64_t head = 0, first_row = 0;
  int64_t packed_geometry = -1, packed_head = -1;
};

}  // namespace vitkernels::VK_ISA
