// Where the tokens of a map's tile lie in a tensor. They lie in short rows far apart, which a processor does not foresee:
// they are found a tile ahead, and brought nearer while another one is worked on.
#pragma once

#include "attention/spatial_tile_cpu.h"
#include "cpu/rows.h"

namespace vitkernels::VK_ISA {

// `Element` is const for tensors that are read.
template <class Element>
class TileTokens {
  static constexpr int kLast = kMaxAxes - 1;

 public:
  TileTokens(int64_t most, int64_t dim, Scratch& scratch) : rows(scratch.take<Element*>(most)), dim(dim) {}

  void find(const MapTensor& t, int64_t batch, int64_t head, const Box& box) {
    count = box.count();
    Element** row = rows;
    box.for_each_line({0, count}, [&](int64_t, int64_t on_line, const Place& first) {
      row = line(t, batch, head, box, first, on_line, row);
    });
  }

  // Tokens beyond the map, whose sizes are given, are `fill`.
  void find(const MapTensor& t, int64_t batch, int64_t head, const Box& box, const int64_t (&map)[kMaxAxes],
            Element* fill) {
    count = box.count();
    const Range inside[] = {box.on_map(0, map[0]), box.on_map(1, map[1]), box.on_map(2, map[2])};
    Element** row = rows;
    box.for_each_line({0, count}, [&](int64_t, int64_t on_line, Place first) {
      Range on_map = intersect(inside[kLast], {0, on_line});
      if (!inside[0].contains(first.at[0]) || !inside[1].contains(first.at[1]) || on_map.empty()) {
        on_map = {on_line, on_line};
      }
      first.at[kLast] = on_map.begin;
      row = std::fill_n(row, on_map.begin, fill);
      row = line(t, batch, head, box, first, on_map.end - on_map.begin, row);
      row = std::fill_n(row, on_line - on_map.end, fill);
    });
  }

  // The same tokens, all of them on the map, of a tensor that is laid out as that of `other`.
  template <class Other>
  void find_as(const TileTokens<Other>& other, const MapTensor& of_other, const MapTensor& t) {
    count = other.count;
    const int64_t distance = reinterpret_cast<intptr_t>(t.data) - reinterpret_cast<intptr_t>(of_other.data);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = reinterpret_cast<Element*>(reinterpret_cast<intptr_t>(other[i]) + distance);
    }
  }

  ScatteredRows<std::remove_const_t<Element>> from(int64_t token) const { return {rows + token}; }
  Element* operator[](int64_t token) const { return rows[token]; }

  // Always inlined: the compiler takes a function that only prefetches for one that does nothing.
  VK_INLINE void fetch(Range tokens) const {
    constexpr int64_t kCacheLine = 64 / sizeof(Element);
    constexpr bool kWrite = !std::is_const_v<Element>;
    constexpr int kSecondLevel = 2;  // what the present tile needs stays in the first
    for (int64_t token = tokens.begin; token < std::min(tokens.end, count); ++token) {
      for (int64_t c = 0; c < dim; c += kCacheLine) __builtin_prefetch(rows[token] + c, kWrite, kSecondLevel);
    }
  }

  int64_t count = 0;

 private:
  VK_INLINE static Element** line(const MapTensor& t, int64_t batch, int64_t head, const Box& box, const Place& first,
                                  int64_t count, Element** row) {
    const int64_t step = t.axis_stride[kLast] * box.step[kLast];
    Element* token = t.at<Element>(batch, box.on_map(first), head);
    for (int64_t i = 0; i < count; ++i, token += step) *row++ = token;
    return row;
  }

  Element** rows;
  int64_t dim;
};

}  // namespace vitkernels::VK_ISA
