// The addresses of a map tile's tokens in a tensor. These are short rows far apart, which hardware prefetchers miss:
// addresses are computed one tile ahead, and the rows prefetched during the current tile.
#pragma once

#include "attention/cpu/spatial_tile.h"
#include "cpu/rows.h"

namespace vitkernels::VK_ISA {

// `Element` is const for inputs.
template <class Element>
class TileTokens {
  static constexpr int kLast = kMaxAxes - 1, kLanes = kWidth<double>;
  static_assert(sizeof(intptr_t) == sizeof(double));

 public:
  TileTokens(int64_t max_count, int64_t dim, Scratch& scratch)
      : own(scratch.take<intptr_t>(max_count + kLanes)), dim(dim) {}

  void find(const MapTensor& t, int64_t batch, int64_t head, const Box& box) {
    intptr_t* row = start(box);
    const Steps steps(t, box);
    const intptr_t first = address_of(t, batch, head, box, {});
    for (int64_t i = 0; i < box.size[0]; ++i) {
      for (int64_t j = 0; j < box.size[1]; ++j) {
        row = line(first + i * steps.of_axis[0] + j * steps.of_axis[1], steps, box.size[kLast], row);
      }
    }
  }

  // Tokens outside the map, whose sizes are given, are `fill`.
  void find(const MapTensor& t, int64_t batch, int64_t head, const Box& box, const int64_t (&map)[kMaxAxes],
            Element* fill) {
    if (box.is_on(map)) return find(t, batch, head, box);
    const Steps steps(t, box);
    const Range inside[] = {box.on_map(0, map[0]), box.on_map(1, map[1]), box.on_map(2, map[2])};
    intptr_t* row = start(box);
    box.for_each_line({0, count}, [&](int64_t, int64_t on_line, Coord first) {
      Range on_map = intersect(inside[kLast], {0, on_line});
      if (!inside[0].contains(first.at[0]) || !inside[1].contains(first.at[1]) || on_map.empty()) {
        on_map = {on_line, on_line};
      }
      first.at[kLast] = on_map.begin;
      row = std::fill_n(row, on_map.begin, reinterpret_cast<intptr_t>(fill));
      row = line(address_of(t, batch, head, box, first), steps, on_map.end - on_map.begin, row);
      row = std::fill_n(row, on_line - on_map.end, reinterpret_cast<intptr_t>(fill));
    });
  }

  // The same tokens, all inside the map, of a tensor with the strides of `of_other`: reuses its list.
  template <class Other>
  void find_as(const TileTokens<Other>& other, const MapTensor& of_other, const MapTensor& t) {
    count = other.count, address = other.address;
    distance = other.distance + reinterpret_cast<intptr_t>(t.data) - reinterpret_cast<intptr_t>(of_other.data);
  }

  ScatteredRows<std::remove_const_t<Element>> from(int64_t token) const { return {address + token, distance}; }
  Element* operator[](int64_t token) const { return reinterpret_cast<Element*>(address[token] + distance); }

  VK_INLINE void prefetch(Range tokens) const {
    for (int64_t token = tokens.begin; token < std::min(tokens.end, count); ++token) {
      prefetch_row<!std::is_const_v<Element>>((*this)[token], dim);
    }
  }

  int64_t count = 0;

 private:
  template <class>
  friend class TileTokens;

  intptr_t* start(const Box& box) {
    count = box.count(), address = own, distance = 0;
    return own;
  }

  // Distances in bytes between neighboring tokens of the box.
  struct Steps {
    intptr_t of_axis[kMaxAxes];
    Bits<double> lanes;  // of the next tokens on the last axis

    Steps(const MapTensor& t, const Box& box) {
      for (int axis = 0; axis < kMaxAxes; ++axis) {
        of_axis[axis] = t.axis_stride[axis] * box.step[axis] * int64_t(sizeof(Element));
      }
      lanes = lane_index<double>() * of_axis[kLast];
    }
  };

  static intptr_t address_of(const MapTensor& t, int64_t batch, int64_t head, const Box& box, const Coord& index) {
    return reinterpret_cast<intptr_t>(t.at<Element>(batch, box.on_map(index), head));
  }

  // In whole vectors: the next line overwrites what this one writes past its end.
  VK_INLINE static intptr_t* line(intptr_t first, const Steps& steps, int64_t count, intptr_t* row) {
    for (int64_t i = 0; i < count; i += kLanes, first += kLanes * steps.of_axis[kLast]) {
      const Bits<double> tokens = first + steps.lanes;
      std::memcpy(row + i, &tokens, sizeof(tokens));
    }
    return row + count;
  }

  intptr_t* own;
  const intptr_t* address = nullptr;
  intptr_t distance = 0;
  int64_t dim;
};

// The queries of a tile, and its keys and values.
template <class S>
struct TileInputs {
  TileTokens<const S> queries, keys, values;

  TileInputs(const SpatialParams& p, Scratch& scratch)
      : queries(p.max_queries(), p.head_dim, scratch),
        keys(p.max_keys(), p.head_dim, scratch),
        values(p.max_keys(), p.value_dim, scratch) {}

  // Keys outside the map are those of the fill, or `zeros`.
  void find(const SpatialParams& p, const TileBoxes& boxes, int64_t batch, int64_t head, const S* zeros) {
    const int64_t kv_head = p.groups.kv_head_of[head];
    const auto fill = [&](const void* rows, int64_t dim) {
      return rows ? static_cast<const S*>(rows) + kv_head * dim : zeros;
    };
    keys.find(p.key, batch, kv_head, boxes.keys, p.key_size, fill(p.key_fill, p.head_dim));
    // Query, key and value are often parts of one tensor.
    const bool is_inside = boxes.keys.is_on(p.key_size);
    if (is_inside && p.value.is_laid_out_as(p.key)) {
      values.find_as(keys, p.key, p.value);
    } else {
      values.find(p.value, batch, kv_head, boxes.keys, p.key_size, fill(p.value_fill, p.value_dim));
    }
    if (is_inside && p.query.is_laid_out_as(p.key) && head == kv_head && boxes.queries == boxes.keys) {
      queries.find_as(keys, p.key, p.query);
    } else {
      queries.find(p.query, batch, head, boxes.queries);
    }
  }
};

}  // namespace vitkernels::VK_ISA
