#include "attention/spatial_tiles.h"

#include <algorithm>
#include <limits>

namespace vitkernels {
namespace {

bool moves_with_query(Rule rule) { return rule == Rule::kNeighborhood || rule == Rule::kSliding; }

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Sizes of a tile of so many queries on an axis.
struct Extent {
  int64_t queries, tiles, keys, of_query;  // keys of the tile and of one query
};

Extent extent(const AxisRule& rule, int64_t wanted) {
  const int64_t length = std::max<int64_t>(divide_up(rule.num_queries, rule.step), 1);
  if (!moves_with_query(rule.rule)) {
    const bool is_block = rule.rule == Rule::kBlock;
    const int64_t keys = is_block ? rule.key_size + 2 * rule.halo : std::max<int64_t>(rule.num_keys / rule.step, 1);
    return {is_block ? rule.size : length, 1, keys, keys};
  }
  const int64_t tiles = divide_up(length, wanted), queries = divide_up(length, tiles);
  return {queries, tiles, queries - 1 + rule.size, rule.size};
}

// The cost of a map, in logits. A group of rows computes one range of columns.
double work(const std::array<Extent, kMaxAxes>& axis) {
  constexpr double kPerKey = 12.0, kPerTile = 400.0;
  constexpr int64_t kGroup = 14;
  int64_t rows = 1, keys = 1, tiles = 1;
  for (const Extent& e : axis) rows *= e.queries, keys *= e.keys, tiles *= e.tiles;
  // Lines along the last axis, then planes, that the queries of a group of rows span.
  const int64_t group = std::min(rows, kGroup);
  const int64_t lines = std::min(divide_up(group, axis[2].queries), axis[0].queries * axis[1].queries);
  const int64_t planes = std::min(divide_up(lines, axis[1].queries), axis[0].queries);
  const int64_t of_plane = planes > 1 ? axis[1].keys : axis[1].of_query + (axis[1].tiles > 0 ? lines - 1 : 0);
  const int64_t line = axis[2].keys, plane = axis[1].keys * line;
  const int64_t seen = (axis[0].of_query + planes - 2) * plane + (std::min(of_plane, axis[1].keys) - 1) * line + line;
  return double(tiles) * (double(rows) * double(std::min(seen, keys) + 16) + kPerKey * double(keys) + kPerTile);
}

}  // namespace

std::array<int64_t, kMaxAxes> tile_extents(const SpatialPattern& pattern) {
  constexpr int64_t kChoices[] = {1, 2, 3, 4, 5, 7, 8, 14, 28, 56, 112}, kMaxRows = 224, kMaxKeys = 768;
  std::array<int64_t, kMaxAxes> best{1, 1, 1};
  double min_cost = std::numeric_limits<double>::infinity();
  const auto choices = [&](int axis) { return moves_with_query(pattern.axis[axis].rule) ? std::size(kChoices) : 1; };
  for (size_t i = 0; i < choices(0); ++i) {
    for (size_t j = 0; j < choices(1); ++j) {
      for (size_t k = 0; k < choices(2); ++k) {
        const std::array<int64_t, kMaxAxes> wanted{kChoices[i], kChoices[j], kChoices[k]};
        std::array<Extent, kMaxAxes> axis;
        double rows = 1, keys = 1;
        for (int a = 0; a < kMaxAxes; ++a) {
          axis[a] = extent(pattern.axis[a], wanted[a]);
          rows *= double(axis[a].queries), keys *= double(axis[a].keys);
        }
        const bool is_first = i + j + k == 0;
        if (!is_first && (rows > kMaxRows || keys > kMaxKeys)) continue;
        const double cost = is_first ? std::numeric_limits<double>::max() : work(axis);
        if (cost < min_cost) min_cost = cost, best = wanted;
      }
    }
  }
  return best;
}

TiledAxis::TiledAxis(const AxisRule& rule, int64_t max_queries) : step(rule.step) {
  for (int64_t r = 0; r < std::min(rule.step, rule.num_queries); ++r) add_class(rule.of_class(r), r, step, max_queries);

  std::vector<bool> is_covered(rule.num_keys);
  int64_t covered = 0;
  for (const AxisTile& tile : tiles) {
    for (int64_t i = 0; i < tile.num_keys; ++i) {
      const int64_t key = tile.first_key + i * step;
      if (key < 0 || key >= rule.num_keys) continue;
      covers_keys_once = covers_keys_once && !is_covered[key];
      is_covered[key] = true;
      ++covered;
    }
  }
  covers_keys_once = covers_keys_once && covered == rule.num_keys;
}

void TiledAxis::add_class(const AxisRule& rule, int64_t first, int64_t step, int64_t max_queries) {
  const int64_t length = rule.num_queries;
  if (length <= 0) return;
  if (rule.rule == Rule::kBlock) {
    for (int64_t index = rule.block_of(0); index <= rule.block_of(length - 1); ++index) {
      add_tile(rule, rule.block(index), first, step);
    }
    return;
  }
  const int64_t count = moves_with_query(rule.rule) ? divide_up(length, max_queries) : 1;
  for (int64_t i = 0; i < count; ++i) add_tile(rule, {length * i / count, length * (i + 1) / count}, first, step);
}

void TiledAxis::add_tile(const AxisRule& rule, Range queries, int64_t first, int64_t step) {
  if (queries.empty()) return;
  Range box{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  for (int64_t u = queries.begin; u < queries.end; ++u) {
    const Range keys = rule.keys(u);
    if (!keys.empty()) box = {std::min(box.begin, keys.begin), std::max(box.end, keys.end)};
  }
  if (box.empty()) box = {0, 0};

  std::vector<std::array<int64_t, 3>> geometry;
  bool sees_all = true;
  for (int64_t u = queries.begin; u < queries.end; ++u) {
    Range keys = relative_to(rule.keys(u), box.begin);
    if (keys.empty()) keys = {0, 0};
    const int64_t coord = (rule.num_keys ? rule.coord(u) : 0) - box.begin;
    geometry.push_back({keys.begin, keys.end, coord});
    sees_all = sees_all && keys.begin == 0 && keys.end == box.end - box.begin;
    if (!keys.empty()) largest_offset = std::max({largest_offset, coord - keys.begin, keys.end - 1 - coord});
  }
  const auto [entry, is_new] = geometries.try_emplace(std::move(geometry));
  if (is_new) {
    for (const auto& [begin, end, coord] : entry->first) entry->second.push_back({{begin, end}, coord});
    numbers.emplace(entry->second.data(), int64_t(numbers.size()));
  }
  const SeenKeys* seen = entry->second.data();
  tiles.push_back({first + queries.begin * step, queries.end - queries.begin, first + box.begin * step,
                   box.end - box.begin, numbers.at(seen), sees_all, seen});
}

AxisTiles TiledAxis::view() const {
  AxisTiles result{
      .tile = tiles.data(), .count = int64_t(tiles.size()), .num_geometries = int64_t(geometries.size()), .step = step};
  for (const AxisTile& tile : tiles) {
    result.max_queries = std::max(result.max_queries, tile.num_queries);
    result.max_keys = std::max(result.max_keys, tile.num_keys);
    result.see_all = result.see_all && tile.sees_all;
  }
  return result;
}

}  // namespace vitkernels
