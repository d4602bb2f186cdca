// Which keys a query sees. Host and device, no torch.
//
// A pattern is a product over axes of contiguous key ranges: a query with coordinates (u0, u1, ...) sees the keys
// whose coordinate on every axis lies in that axis' range. Each axis has its own numbers of queries and keys.
// Kernels ask per tile: skip it, take it whole, or look at the range of every row.
//
// Dense attention has one Axis. Spatial attention has an AxisRule for each axis of the map.
#pragma once

#include "common/range.h"

namespace vitkernels {

struct Axis {
  int64_t num_queries = 1, num_keys = 1;
  bool is_causal = false;

  // Keys of query u: all of them, or those up to u (aligned at the first query and key).
  VK_HOST_DEVICE Range keys(int64_t u) const { return {0, is_causal && u + 1 < num_keys ? u + 1 : num_keys}; }

  // Keys that at least one of the queries in `u` sees. Both ends of a rule's range are nondecreasing in u.
  VK_HOST_DEVICE Range any_keys(Range u) const { return {keys(u.begin).begin, keys(u.end - 1).end}; }

  // Keys that all of them see.
  VK_HOST_DEVICE Range all_keys(Range u) const { return {keys(u.end - 1).begin, keys(u.begin).end}; }
};

inline constexpr int kMaxAxes = 3;

enum class Rule : int32_t {
  kFull,          // all keys
  kBlock,         // those of the query's block, grown by a halo on both sides
  kNeighborhood,  // the nearest `size` keys, the same number at the border
  kSliding,       // those at most size / 2 away, fewer at the border
};

// One axis of a map. A step splits it into residue classes that do not see each other: class r holds the tokens
// r, r + step, r + 2 step, ..., and everything else here counts the tokens of one class, whose axis of_class(r) is.
struct AxisRule {
  Rule rule = Rule::kFull;
  int64_t num_queries = 1, num_keys = 1;
  int64_t step = 1;
  int64_t size = 1;      // kBlock: queries of a block; kNeighborhood, kSliding: keys
  int64_t key_size = 1;  // kBlock: keys of a block
  int64_t shift = 0;     // kBlock: where the first whole block begins; the tokens before it form a block too
  int64_t halo = 0;      // kBlock
  int64_t stride = 1;    // kNeighborhood: this many queries share a neighborhood
  bool is_causal = false;
  bool has_outside = false;  // there are keys outside the map: ranges are not clipped at its border

  VK_HOST_DEVICE AxisRule of_class(int64_t r) const {
    AxisRule result = *this;
    result.num_queries = (num_queries - r + step - 1) / step;
    result.num_keys = (num_keys - r + step - 1) / step;
    result.step = 1;
    return result;
  }

  // The coordinate of a query among the keys.
  VK_HOST_DEVICE int64_t coord(int64_t u) const { return num_queries == num_keys ? u : u * num_keys / num_queries; }

  // The block of a query, and the queries of a block. Block 0 is empty without a shift.
  VK_HOST_DEVICE int64_t block_of(int64_t u) const { return (u - shift + size) / size; }
  VK_HOST_DEVICE Range block(int64_t index) const {
    const int64_t begin = shift + (index - 1) * size;
    return intersect({begin, begin + size}, {0, num_queries});
  }

  // The keys of query u. Both ends are nondecreasing in u.
  VK_HOST_DEVICE Range keys(int64_t u) const {
    const Range map{0, num_keys};
    const Range seen = is_causal ? causal_keys(u) : uncut_keys(u);
    return has_outside && !is_causal ? seen : intersect(seen, map);
  }
  VK_HOST_DEVICE Range any_keys(Range u) const { return {keys(u.begin).begin, keys(u.end - 1).end}; }
  VK_HOST_DEVICE Range all_keys(Range u) const { return {keys(u.end - 1).begin, keys(u.begin).end}; }

  // The queries that see key v: a range too, since both ends of keys(u) are nondecreasing.
  VK_HOST_DEVICE Range queries(int64_t v) const {
    return {first_query([&](int64_t u) { return keys(u).end > v; }),
            first_query([&](int64_t u) { return keys(u).begin > v; })};
  }

 private:
  VK_HOST_DEVICE Range uncut_keys(int64_t u) const {
    if (rule == Rule::kBlock) {
      const int64_t begin = shift * key_size / size + (block_of(u) - 1) * key_size;
      return {begin - halo, begin + key_size + halo};
    }
    if (rule == Rule::kNeighborhood) return neighborhood(u);
    if (rule == Rule::kSliding) {
      const int64_t begin = coord(u) - size / 2;
      return {begin, begin + size};
    }
    return {0, num_keys};
  }

  VK_HOST_DEVICE Range neighborhood(int64_t u) const {
    const int64_t at = coord(u), of_group = stride * (at / stride) + stride / 2;
    const int64_t leader = of_group < num_keys ? of_group : num_keys - 1;
    const int64_t last = num_keys - size, wanted = leader - size / 2;
    const int64_t begin = wanted < 0 ? 0 : wanted < last ? wanted : last;
    return {begin, begin + size};
  }

  VK_HOST_DEVICE Range causal_keys(int64_t u) const {
    const int64_t at = coord(u);
    if (rule == Rule::kNeighborhood) {
      const int64_t of_group = stride * (at / stride) + stride - 1;
      const int64_t leader = of_group < num_keys ? of_group : num_keys - 1;
      return {leader - size + 1, at + 1};
    }
    return intersect(uncut_keys(u), {0, at + 1});
  }

  // The first query for which `is_behind` holds; it then holds for all later ones.
  template <class Predicate>
  VK_HOST_DEVICE int64_t first_query(Predicate&& is_behind) const {
    int64_t begin = 0, end = num_queries;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (is_behind(middle)) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }
};

struct SpatialPattern {
  AxisRule axis[kMaxAxes];  // depth, height, width; with fewer axes, the last ones
  double radius = 0.0;      // 0: none; else only keys at most this many tokens away (Euclidean distance)

  VK_HOST_DEVICE int64_t num_queries() const { return axis[0].num_queries * axis[1].num_queries * axis[2].num_queries; }
  VK_HOST_DEVICE int64_t num_keys() const { return axis[0].num_keys * axis[1].num_keys * axis[2].num_keys; }
};

}  // namespace vitkernels
