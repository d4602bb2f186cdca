// Score terms of a tile of a map on the CPU. What depends on the geometry and the head alone, the mask and the tables, is
// expanded once for all tiles that have them in common; their gradients are gathered just so.
#pragma once

#include "attention/grid_cpu.h"
#include "attention/spatial_tile_cpu.h"

namespace vitkernels::VK_ISA {

// A block of rows and a range of columns of a tile.
struct TilePiece {
  Range rows, columns;
  int64_t index, count;  // among those of the tile
};

// What is added to, and multiplied with, the logits of a piece: rows of queries, columns of keys.
template <class T>
struct ExpandedTile {
  int64_t geometry = -1, head = -1, piece = -1;
  TilePiece of{};
  TileView view{};
  int64_t stride = 0;                        // the piece's columns, up to a whole vector
  T *bias = nullptr, *multiplier = nullptr;  // [rows, stride]; a bias of minus infinity hides a key
  T *bias_gradient = nullptr, *multiplier_gradient = nullptr;
  int64_t num_sums = 0;  // pieces that the gradients are the sum of
};

template <class T>
class ExpandedTiles {
 public:
  ExpandedTiles(const SpatialParams& params, int64_t most_rows, int64_t most_columns, int64_t most_pieces,
                bool with_gradients, Scratch& scratch)
      : p(params), grid(p.score.on_grid.grid), most_stride(round_up(most_columns, kWidth<T>)) {
    constexpr int64_t kMemory = 768 << 10;
    const GridTerms& terms = p.score.on_grid;
    const bool has_multiplier = terms.multiplier.data;
    const bool has_gradients = with_gradients && (terms.bias.grad || terms.multiplier.grad);
    const int64_t elements = most_rows * most_stride, arrays = (has_multiplier ? 2 : 1) * (has_gradients ? 2 : 1);
    const int64_t fitting = kMemory / (elements * int64_t(sizeof(T)) * arrays + 1);
    const int64_t geometries = p.axis[0].num_geometries * p.axis[1].num_geometries * p.axis[2].num_geometries;
    num_slots = std::clamp<int64_t>(std::min(geometries * most_pieces, fitting), 1, kMostSlots);
    for (int64_t i = 0; i < num_slots; ++i) {
      slots[i].bias = scratch.take<T>(elements);
      if (has_multiplier) slots[i].multiplier = scratch.take<T>(elements);
      if (has_gradients) slots[i].bias_gradient = scratch.take<T>(elements);
      if (has_gradients && has_multiplier) slots[i].multiplier_gradient = scratch.take<T>(elements);
    }
  }

  ExpandedTile<T>& at(const SpatialTile& tile, int64_t head, const TilePiece& piece, int64_t part) {
    const GridTerms& terms = p.score.on_grid;
    if (!terms.multiplier.data && !terms.bias.data) head = 0;  // the mask is every head's
    ExpandedTile<T>& slot = slots[(tile.geometry * piece.count + piece.index) % num_slots];
    const bool is_same = slot.geometry == tile.geometry && slot.head == head && slot.piece == piece.index;
    // Sums of many numbers of one size lose bits.
    constexpr int64_t kMostSums = 64;
    if (!is_same || slot.num_sums == kMostSums) flush(slot, part);
    if (!is_same) {
      slot.geometry = tile.geometry, slot.head = head, slot.piece = piece.index, slot.of = piece;
      slot.view = tile.view(), slot.stride = round_up(piece.columns.end - piece.columns.begin, kWidth<T>);
      expand(slot);
      clear_gradients(slot);
    }
    return slot;
  }

  // Adds what is left of the gradients to the part of a task that is done.
  void flush(int64_t part) {
    for (int64_t i = 0; i < num_slots; ++i) flush(slots[i], part);
  }

 private:
  static constexpr int64_t kMostSlots = 64;
  static constexpr int kLast = kMaxAxes - 1;

  // A stretch of keys that a row sees, by the first of them.
  struct Line {
    int64_t element, count, entry;  // in the expanded tile and in the tables
    Place query, key;
  };

  // Calls f(line) for them. Rows that differ on the last axis only follow each other at every line of keys.
  template <class Function>
  VK_INLINE void for_each_line(const ExpandedTile<T>& slot, Function&& f) const {
    const TileView& view = slot.view;
    const Range rows = slot.of.rows, columns = slot.of.columns;
    for (int64_t row = rows.begin, count; row < rows.end; row += count) {
      const Place query = view.query(row);
      count = std::min(view.queries[kLast] - query.at[kLast], rows.end - row);
      const SeenKeys *outer = view.seen[0] + query.at[0], *inner = view.seen[1] + query.at[1];
      const SeenKeys* on_line = view.seen[kLast] + query.at[kLast];  // [count]
      for (int64_t i = outer->keys.begin; i < outer->keys.end; ++i) {
        for (int64_t j = inner->keys.begin; j < inner->keys.end; ++j) {
          const int64_t line = (i * view.keys[1] + j) * view.keys[kLast];
          const int64_t element = (row - rows.begin) * slot.stride + line - columns.begin;
          const int64_t entry = grid.query_entry({{outer->place, inner->place, 0}}) + grid.key_entry({{i, j, 0}});
          const Range inside = relative_to(columns, line);
          for (int64_t r = 0; r < count; ++r) {
            const Range keys = intersect(on_line[r].keys, inside);
            if (keys.empty()) continue;
            const int64_t place = on_line[r].place;
            f(Line{element + r * slot.stride + keys.begin,
                   keys.end - keys.begin,
                   entry - place + keys.begin,
                   {{outer->place, inner->place, place}},
                   {{i, j, keys.begin}}});
          }
        }
      }
    }
  }

  // A loop for each of the arrays: for both of them at once there are not enough registers.
  void expand(const ExpandedTile<T>& slot) const {
    const int64_t elements = (slot.of.rows.end - slot.of.rows.begin) * slot.stride;
    std::fill_n(slot.bias, elements, kMinusInfinity<T>);
    if (const T* bias = table(p.score.on_grid.bias, slot.head)) {
      copy(slot, bias, slot.bias);
    } else {
      for_each_line(slot, [to = slot.bias](const Line& line) VK_BODY {
        for (int64_t c = 0; c < line.count; c += kWidth<T>)
          store_first(to + line.element + c, Vec<T>{}, line.count - c);
      });
    }
    if (slot.multiplier) {
      std::fill_n(slot.multiplier, elements, T(1));
      copy(slot, table(p.score.on_grid.multiplier, slot.head), slot.multiplier);
    }
    if (p.radius > 0) for_each_line(slot, [&](const Line& line) { hide_distant(slot.bias + line.element, line); });
  }

  // At most a vector.
  VK_INLINE static void store_first(T* to, Vec<T> v, int64_t count) {
    count < kWidth<T> ? store_partial(to, v, count) : store(to, v);
  }

  // Of a table, behind whose entries there are some more.
  void copy(const ExpandedTile<T>& slot, const T* from, T* to) const {
    for_each_line(slot, [=](const Line& line) VK_BODY {
      for (int64_t c = 0; c < line.count; c += kWidth<T>) {
        store_first(to + line.element + c, load(from + line.entry + c), line.count - c);
      }
    });
  }

  void hide_distant(T* bias, const Line& line) const {
    const auto squared = [&](int axis, int64_t at) {
      const double distance = double((line.query.at[axis] - at) * p.axis[axis].step);
      return distance * distance;
    };
    double outer = 0;
    for (int axis = 0; axis < kLast; ++axis) outer += squared(axis, line.key.at[axis]);
    for (int64_t i = 0; i < line.count; ++i) {
      const double distance = outer + squared(kLast, line.key.at[kLast] + i);
      if (distance > p.radius * p.radius) bias[i] = kMinusInfinity<T>;
    }
  }

  void flush(ExpandedTile<T>& slot, int64_t part) const {
    if (slot.num_sums == 0) return;
    slot.num_sums = 0;
    double* bias = sums(p.score.on_grid.bias, part, slot.head);
    double* multiplier = sums(p.score.on_grid.multiplier, part, slot.head);
    for_each_line(slot, [&](const Line& line) VK_BODY {
      if (bias) add_to_sums(bias + line.entry, slot.bias_gradient + line.element, line.count);
      if (multiplier) add_to_sums(multiplier + line.entry, slot.multiplier_gradient + line.element, line.count);
    });
    clear_gradients(slot);
  }

  void clear_gradients(const ExpandedTile<T>& slot) const {
    const int64_t rows = slot.of.rows.end - slot.of.rows.begin;
    if (slot.bias_gradient) std::fill_n(slot.bias_gradient, rows * slot.stride, T(0));
    if (slot.multiplier_gradient) std::fill_n(slot.multiplier_gradient, rows * slot.stride, T(0));
  }

  static const T* table(const TableTerm& term, int64_t head) {
    return term.data ? static_cast<const T*>(term.data) + head * term.head_stride : nullptr;
  }
  static double* sums(const TableTerm& term, int64_t part, int64_t head) {
    return term.grad ? term.grad + part * term.grad_part_stride + head * term.grad_head_stride : nullptr;
  }

  const SpatialParams& p;
  const Grid& grid;

 public:
  const int64_t most_stride;

 private:
  int64_t num_slots;
  ExpandedTile<T> slots[kMostSlots];
};

// All terms along one row.
template <class T>
class SpatialTerms {
 public:
  struct Sizes {
    int64_t most_rows, most_columns, most_pieces, most_group;  // a group of rows is multiplied at once
    bool with_gradients;
  };

  SpatialTerms(const SpatialParams& params, const Sizes& sizes, Scratch& scratch)
      : p(params),
        expanded(p, sizes.most_rows, sizes.most_columns, sizes.most_pieces, sizes.with_gradients, scratch),
        relative(terms, relative_sizes(sizes), scratch) {
    if (p.key_bias.data) key_bias = scratch.take<T>(expanded.most_stride);
    if (terms.has_rel_pos()) bias = scratch.take<T>(expanded.most_stride);
    if (!sizes.with_gradients) return;
    if (terms.has_rel_pos()) row_gradient = scratch.take<T>(expanded.most_stride);
    if (p.key_bias_sums) key_bias_gradient = scratch.take<T>(expanded.most_stride);
  }

  // Whether anything is done to the logits of a tile.
  bool any_on(const SpatialTile& tile) const { return tile.has_holes || p.has_terms(); }

  // Before a tile's columns meet a block of its rows.
  void start_columns(int64_t batch, int64_t head, const SpatialTile& of_tile, Range columns) {
    tile = &of_tile;
    if (!key_bias) return;
    const int64_t step = p.key_bias.axis_stride[kLast] * tile->keys.step[kLast];
    T* to = key_bias;
    const auto inside_on = [&](int axis) { return tile->keys.on_map(axis, p.key_size[axis]); };
    const Range inside[] = {inside_on(0), inside_on(1), inside_on(2)};
    tile->keys.for_each_line(columns, [&](int64_t, int64_t count, const Place& first) {
      const bool on_map = inside[0].contains(first.at[0]) && inside[1].contains(first.at[1]);
      const T* from = p.key_bias.at<const T>(batch, tile->keys.on_map(first), head);
      for (int64_t i = 0; i < count; ++i) {
        to[i] = on_map && inside[kLast].contains(first.at[kLast] + i) ? from[i * step] : T(0);
      }
      to += count;
    });
    if (key_bias_gradient) std::fill_n(key_bias_gradient, columns.end - columns.begin, T(0));
  }

  void start_piece(int64_t of_head, const TilePiece& of_piece, int64_t part) {
    head = of_head, piece = of_piece;
    slot = &expanded.at(*tile, head, piece, part);
    if (!terms.has_rel_pos()) return;
    const bool is_packed = packed_geometry == tile->geometry && packed_head == head;
    if (!is_packed) relative.pack(head, entries = tile_entries());
    packed_geometry = tile->geometry, packed_head = head;
  }

  // Before rows of the piece are read; `queries` are theirs.
  template <class Rows>
  void start_rows(Rows queries, Range rows) {
    first_row = rows.begin;
    if (terms.has_rel_pos()) relative.multiply(queries, rows.end - rows.begin, entries);
  }

  // The terms of a row from a column of the piece on.
  ScoreRow<T> row(int64_t row, int64_t first_column) {
    const int64_t at = (row - piece.rows.begin) * slot->stride;
    const T* added = slot->bias + at;
    if (terms.has_rel_pos()) {
      add_relative(row, added);
      added = bias;
    }
    return {slot->multiplier ? slot->multiplier + at + first_column : nullptr, added + first_column,
            key_bias ? key_bias + first_column : nullptr};
  }

  // Whether what is expanded to a bias is all that there is. Then these are the row's, and its gradient's or null.
  bool is_bias() const { return !slot->multiplier && !key_bias && !terms.has_rel_pos(); }
  BiasRow<T> bias_row(int64_t row, int64_t first_column) const {
    return {slot->bias + (row - piece.rows.begin) * slot->stride + first_column};
  }
  T* bias_gradient_row(int64_t row, int64_t first_column) const {
    T* gradient = slot->bias_gradient;
    return gradient ? gradient + (row - piece.rows.begin) * slot->stride + first_column : nullptr;
  }

  // One vector of that row's gradient. Columns count from the same one.
  VK_INLINE void add_gradient(int64_t row, int64_t first_column, Vec<T> grad, Vec<T> product, int64_t column,
                              Range lanes) {
    const int64_t at = first_column + column, element = (row - piece.rows.begin) * slot->stride + at;
    const Vec<T> inside = keep(grad, lanes, T(0));
    if (slot->bias_gradient) add_vector(slot->bias_gradient + element, inside);
    if (slot->multiplier_gradient) {
      add_vector(slot->multiplier_gradient + element, keep(grad * product, lanes, T(0)));
    }
    if (key_bias_gradient) add_vector(key_bias_gradient + at, inside);
    if (row_gradient) store(row_gradient + at, inside);
  }

  // After the last of them.
  void finish_row(int64_t row) {
    if (!row_gradient) return;
    const TileView view = tile->view();
    const Place query = view.query(row), place = view.place(query);
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      T* to = relative.gradient_row(axis, row - first_row, terms.grid.first_entry(axis, place));
      if (!to) continue;
      view.for_each_line(query, piece.columns, [&](int64_t column, int64_t count, const Place& key) {
        const T* gradient = row_gradient + column - piece.columns.begin;
        if (axis == kLast) {
          for (int64_t i = 0; i < count; ++i) to[key.at[kLast] + i] += gradient[i];
        } else {
          to[key.at[axis]] += sum_of(gradient, count);
        }
      });
    }
  }

  // After the last row that start_rows named; `query_gradient` is theirs without the scale.
  void finish_rows(int64_t part, T* query_gradient) const {
    if (terms.has_rel_pos()) relative.add_gradients(part, head, query_gradient);
  }

  void finish_piece() { slot->num_sums += slot->bias_gradient != nullptr; }

  // After the last piece of the columns.
  void finish_columns(int64_t split, int64_t batch, int64_t of_head, Range columns) const {
    if (!key_bias_gradient) return;
    T* sums = static_cast<T*>(p.key_bias_sums) + ((split * p.batch + batch) * p.heads + of_head) * p.num_keys();
    const Range inside = tile->keys.on_map(kLast, p.key_size[kLast]);
    const T* from = key_bias_gradient;
    tile->keys.for_each_line(columns, [&](int64_t, int64_t count, const Place& first) {
      bool on_map = true;
      for (int axis = 0; axis < kLast; ++axis) {
        on_map = on_map && tile->keys.on_map(axis, p.key_size[axis]).contains(first.at[axis]);
      }
      const Place place = tile->keys.on_map(first);
      T* to = sums + (place.at[0] * p.key_size[1] + place.at[1]) * p.key_size[2] + place.at[2];
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
    typename RelativeLogits<T>::Sizes result{p.head_dim, sizes.most_group, {}, sizes.with_gradients};
    for (int axis = 0; axis < kMaxAxes; ++axis) result.most_entries[axis] = terms.grid.num_offsets(axis);
    return result;
  }

  // Those of all queries and keys of the tile, but what the tables have no entries for no query sees.
  EntryRanges tile_entries() const {
    EntryRanges result;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const Range places = tile->places(axis);
      const int64_t size = terms.grid.size[axis];
      const Range all{0, terms.grid.num_offsets(axis)};
      result[axis] = intersect({size - places.end, size - 1 - places.begin + tile->keys.size[axis]}, all);
    }
    return result;
  }

  void add_relative(int64_t row, const T* added) {
    const TileView view = tile->view();
    const Place query = view.query(row), place = view.place(query);
    std::copy_n(added, slot->stride, bias);
    const T* along[kMaxAxes];
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      along[axis] = relative.row(axis, row - first_row, terms.grid.first_entry(axis, place));
    }
    view.for_each_line(query, piece.columns, [&](int64_t column, int64_t count, const Place& key) {
      T* to = bias + column - piece.columns.begin;
      T same = 0;
      for (int axis = 0; axis < kLast; ++axis) {
        if (along[axis]) same += along[axis][key.at[axis]];
      }
      for (int64_t i = 0; i < count; ++i) to[i] += same + (along[kLast] ? along[kLast][key.at[kLast] + i] : T(0));
    });
  }

  const SpatialParams& p;
  const GridTerms& terms = p.score.on_grid;
  ExpandedTiles<T> expanded;
  RelativeLogits<T> relative;
  T *key_bias = nullptr, *bias = nullptr;                   // [columns] of a tile; of a row
  T *key_bias_gradient = nullptr, *row_gradient = nullptr;  // likewise
  const SpatialTile* tile = nullptr;
  ExpandedTile<T>* slot = nullptr;
  TilePiece piece{};
  EntryRanges entries{};
  int64_t head = 0, first_row = 0;
  int64_t packed_geometry = -1, packed_head = -1;
};

}  // namespace vitkernels::VK_ISA
