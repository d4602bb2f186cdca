// The mask and the tables of a tile, expanded to its logits. They depend on its geometry and head alone, so tiles that
// agree in both share them; their gradients accumulate in the same layout.
#pragma once

#include "attention/cpu/offset_grid.h"
#include "attention/cpu/spatial_tile.h"

namespace vitkernels::VK_ISA {

// A logit tile: a block of rows (queries) and a range of columns (keys) of a map tile.
struct LogitTile {
  Range rows, columns;
  int64_t index, count;  // among the logit tiles of the map tile
};

// The bias and the multiplier of a logit tile.
template <class T>
struct ExpandedTile {
  int64_t geometry = -1, head = -1, logit_tile = -1;
  LogitTile of{};
  TileView view{};
  int64_t stride = 0;                        // columns, rounded up to whole vectors; the padding holds any value
  T *bias = nullptr, *multiplier = nullptr;  // [rows, stride]; a bias of minus infinity masks a key
  T *bias_gradient = nullptr, *multiplier_gradient = nullptr;
  int64_t num_sums = 0;  // logit tiles accumulated in the gradients
};

template <class T>
class ExpandedTiles {
 public:
  ExpandedTiles(const SpatialParams& params, int64_t max_rows, int64_t max_columns, int64_t max_logit_tiles,
                bool with_gradients, Scratch& scratch)
      : p(params), grid(p.score.by_offset.grid), max_stride(round_up(max_columns, kWidth<T>)) {
    constexpr int64_t kMemory = 768 << 10;
    const OffsetTerms& terms = p.score.by_offset;
    const bool has_multiplier = terms.multiplier.data;
    const bool has_gradients = with_gradients && (terms.bias.grad || terms.multiplier.grad);
    const int64_t elements = max_rows * max_stride, arrays = (has_multiplier ? 2 : 1) * (has_gradients ? 2 : 1);
    const int64_t fitting = kMemory / (elements * int64_t(sizeof(T)) * arrays + 1);
    const int64_t geometries = p.axis[0].num_geometries * p.axis[1].num_geometries * p.axis[2].num_geometries;
    num_slots = std::clamp<int64_t>(std::min(geometries * max_logit_tiles, fitting), 1, kMaxSlots);
    for (int64_t i = 0; i < num_slots; ++i) {
      slots[i].bias = scratch.take<T>(elements);
      if (has_multiplier) slots[i].multiplier = scratch.take<T>(elements);
      if (has_gradients) slots[i].bias_gradient = scratch.take<T>(elements);
      if (has_gradients && has_multiplier) slots[i].multiplier_gradient = scratch.take<T>(elements);
    }
    if ((terms.bias.data || has_multiplier) && p.max_keys() <= max_columns) {
      const int64_t max_lines = p.axis[kMiddle].max_keys + p.axis[kMiddle].max_queries - 1;
      lines = scratch.take<T>(max_lines * p.axis[kLast].max_keys + kWidth<T>);
    }
  }

  ExpandedTile<T>& at(const SpatialTile& tile, int64_t head, const LogitTile& logit_tile, int64_t part) {
    const OffsetTerms& terms = p.score.by_offset;
    if (!terms.multiplier.data && !terms.bias.data) head = 0;  // all heads share the mask
    ExpandedTile<T>& slot = slots[(tile.geometry * logit_tile.count + logit_tile.index) % num_slots];
    const bool is_same = slot.geometry == tile.geometry && slot.head == head && slot.logit_tile == logit_tile.index;
    // Long float sums lose precision: flushed to double in time.
    constexpr int64_t kMaxSums = 64;
    if (!is_same || slot.num_sums == kMaxSums) flush(slot, part);
    if (!is_same) {
      slot.geometry = tile.geometry, slot.head = head, slot.logit_tile = logit_tile.index, slot.of = logit_tile;
      slot.view = tile.view(), slot.stride = round_up(logit_tile.columns.end - logit_tile.columns.begin, kWidth<T>);
      expand(slot, have_common_lines(tile, logit_tile));
      clear_gradients(slot);
    }
    return slot;
  }

  // Adds the accumulated gradients to the partial sums of a task, at its end.
  void flush(int64_t part) {
    for (int64_t i = 0; i < num_slots; ++i) flush(slots[i], part);
  }

 private:
  static constexpr int64_t kMaxSlots = 64;
  static constexpr int kMiddle = kMaxAxes - 2, kLast = kMaxAxes - 1;

  // A run of keys that a row sees, by its first key.
  struct Line {
    int64_t element, count, entry;  // in the expanded tile and in the tables
    Coord query, key;
  };

  // Calls f(line) for all of them; the inner loop is over rows that differ in the last coordinate only.
  template <class Function>
  VK_INLINE void for_each_line(const ExpandedTile<T>& slot, Function&& f) const {
    const TileView& view = slot.view;
    const Range rows = slot.of.rows, columns = slot.of.columns;
    for (int64_t row = rows.begin, count; row < rows.end; row += count) {
      const Coord query = view.query(row);
      count = std::min(view.queries[kLast] - query.at[kLast], rows.end - row);
      const SeenKeys *outer = view.seen[0] + query.at[0], *inner = view.seen[1] + query.at[1];
      const SeenKeys* on_line = view.seen[kLast] + query.at[kLast];  // [count]
      for (int64_t i = outer->keys.begin; i < outer->keys.end; ++i) {
        for (int64_t j = inner->keys.begin; j < inner->keys.end; ++j) {
          const int64_t line = (i * view.keys[1] + j) * view.keys[kLast];
          const int64_t element = (row - rows.begin) * slot.stride + line - columns.begin;
          const int64_t entry = grid.query_entry({{outer->coord, inner->coord, 0}}) + grid.key_entry({{i, j, 0}});
          const Range inside = relative_to(columns, line);
          for (int64_t r = 0; r < count; ++r) {
            const Range keys = intersect(on_line[r].keys, inside);
            if (keys.empty()) continue;
            const int64_t coord = on_line[r].coord;
            f(Line{element + r * slot.stride + keys.begin,
                   keys.end - keys.begin,
                   entry - coord + keys.begin,
                   {{outer->coord, inner->coord, coord}},
                   {{i, j, keys.begin}}});
          }
        }
      }
    }
  }

  // Whether copy_lines applies and pays off. Contiguous coordinates bound the number of lines it gathers.
  bool have_common_lines(const SpatialTile& tile, const LogitTile& logit_tile) const {
    const Range coords = tile.coords(kMiddle);
    const bool are_neighbors = coords.end - coords.begin == tile.queries.size[kMiddle];
    const bool is_all_keys = logit_tile.columns.end - logit_tile.columns.begin == tile.keys.count();
    const bool is_several_lines = logit_tile.rows.end - logit_tile.rows.begin >= 2 * tile.queries.size[kLast];
    return lines && tile.sees_all && are_neighbors && is_all_keys && is_several_lines;
  }

  // One loop per array: both at once would run out of registers.
  void expand(const ExpandedTile<T>& slot, bool has_common_lines) const {
    const int64_t elements = (slot.of.rows.end - slot.of.rows.begin) * slot.stride;
    const T* bias = table(p.score.by_offset.bias, slot.head);
    const T* multiplier = table(p.score.by_offset.multiplier, slot.head);
    if (has_common_lines && bias) {
      copy_lines(slot, bias, slot.bias);
    } else {
      std::fill_n(slot.bias, elements, kMinusInfinity<T>);
      if (bias)
        copy(slot, bias, slot.bias);
      else
        show(slot);
    }
    if (has_common_lines && multiplier) {
      copy_lines(slot, multiplier, slot.multiplier);
    } else if (multiplier) {
      std::fill_n(slot.multiplier, elements, T(1));
      copy(slot, multiplier, slot.multiplier);
    }
    if (p.radius > 0) for_each_line(slot, [&](const Line& line) { hide_distant(slot.bias + line.element, line); });
  }

  void show(const ExpandedTile<T>& slot) const {
    for_each_line(slot, [to = slot.bias](const Line& line) VK_BODY {
      for (int64_t c = 0; c < line.count; c += kWidth<T>) store_first(to + line.element + c, Vec<T>{}, line.count - c);
    });
  }

  // At most a vector.
  VK_INLINE static void store_first(T* to, Vec<T> v, int64_t count) {
    count < kWidth<T> ? store_partial(to, v, count) : store(to, v);
  }

  // From a table that is padded by a vector.
  void copy(const ExpandedTile<T>& slot, const T* from, T* to) const {
    for_each_line(slot, [=](const Line& line) VK_BODY {
      for (int64_t c = 0; c < line.count; c += kWidth<T>) {
        store_first(to + line.element + c, load(from + line.entry + c), line.count - c);
      }
    });
  }

  // From a table, if every row sees all columns. The entries of a query are those of the query above it, shifted by one
  // line of keys: the lines of a column of queries are gathered once, and each row copies a contiguous run of them.
  void copy_lines(const ExpandedTile<T>& slot, const T* from, T* to) const {
    const TileView& view = slot.view;
    const int64_t width = view.keys[kLast], count = view.keys[kMiddle] * width;  // of a line; of a plane of keys
    const int64_t plane = view.queries[kMiddle] * view.queries[kLast];
    for (int64_t i = 0; i < view.queries[0]; ++i) {
      const Range rows = relative_to(intersect(slot.of.rows, {i * plane, (i + 1) * plane}), i * plane);
      if (rows.empty()) continue;
      const SeenKeys* middle = view.seen[kMiddle];
      const Range above{rows.begin / view.queries[kLast], divide_up(rows.end, view.queries[kLast])};
      const int64_t last_coord = middle[above.end - 1].coord;
      const int64_t num_lines = last_coord - middle[above.begin].coord + view.keys[kMiddle];
      for (int64_t j = 0; j < view.queries[kLast]; ++j) {
        const int64_t first = grid.query_entry({{view.seen[0][i].coord, last_coord, view.seen[kLast][j].coord}});
        for (int64_t key = 0; key < view.keys[0]; ++key) {
          const T* entry = from + first + grid.key_entry({{key, 0, 0}});
          for (int64_t line = 0; line < num_lines; ++line, entry += grid.num_offsets(kLast)) {
            for (int64_t c = 0; c < width; c += kWidth<T>) store(lines + line * width + c, load(entry + c));
          }
          for (int64_t query = above.begin; query < above.end; ++query) {
            const int64_t row = query * view.queries[kLast] + j;
            if (!rows.contains(row)) continue;
            const T* of_row = lines + (last_coord - middle[query].coord) * width;
            T* target = to + (i * plane + row - slot.of.rows.begin) * slot.stride + key * count;
            for (int64_t c = 0; c < count; c += kWidth<T>) {
              store_first(target + c, load(of_row + c), slot.stride - key * count - c);
            }
          }
        }
      }
    }
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
    double* bias = sums(p.score.by_offset.bias, part, slot.head);
    double* multiplier = sums(p.score.by_offset.multiplier, part, slot.head);
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
  const OffsetGrid& grid;

 public:
  const int64_t max_stride;

 private:
  int64_t num_slots;
  T* lines = nullptr;  // [lines of a table, keys of the last axis] and a vector, or null
  ExpandedTile<T> slots[kMaxSlots];
};

}  // namespace vitkernels::VK_ISA
