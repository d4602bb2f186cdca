#include "attention/op/routed_arguments.h"

#include <limits>

namespace vitkernels {
namespace {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();  // of a map
constexpr int64_t kMaxListed = int64_t(1) << 26;                     // keys of a group

std::vector<int64_t> map_of(const Tensor& t) {
  const std::vector<int64_t> sizes = sizes_of(t);
  return {sizes.begin() + 1, sizes.end() - 2};
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

// The distance between tokens of a map if it is the same between all neighbors.
std::optional<int64_t> token_stride(const Tensor& t) {
  int64_t stride = 0, next = 0;  // of the axis before
  for (int64_t axis = t.dim() - 3; axis > 0; --axis) {
    if (t.size(axis) == 1) continue;
    if (next == 0) {
      stride = t.stride(axis);
    } else if (t.stride(axis) != next) {
      return {};
    }
    next = t.stride(axis) * t.size(axis);
    if (next == 0) return {};
  }
  return stride;
}

void check_regions(const Checker& checker, const char* name, const std::vector<int64_t>& region, size_t axes) {
  checker.check(region.size() == axes, name, " has ", region.size(), " sizes, takes ", axes,
                ", one for each axis of the map");
  for (const int64_t size : region) checker.check(size > 0, name, " has ", size, ", takes sizes of at least 1");
}

}  // namespace

Tensor with_even_tokens(const Tensor& t) {
  const Tensor rows = with_unit_last_stride(t);
  return token_stride(rows) || rows.numel() == 0 ? rows : as_contiguous(rows);
}

TokenTensor map_tokens(const Tensor& t) {
  return {.data = const_cast<void*>(t.const_data_ptr()),
          .batch_stride = t.stride(0),
          .token_stride = token_stride(t).value_or(0),
          .head_stride = t.stride(t.dim() - 2)};
}

Regions::Regions(const std::vector<int64_t>& map, std::vector<int64_t> region, bool keeps_outside) {
  std::vector<int64_t> counts;
  for (size_t axis = 0; axis < map.size(); ++axis) {
    if (!keeps_outside) region[axis] = std::min(region[axis], std::max<int64_t>(map[axis], 1));
    counts.push_back(map[axis] / region[axis] + (map[axis] % region[axis] != 0));
  }
  count = product(counts), tokens_per_region = product(region);
  // Axis by axis, each within those before: of every region the tokens, -1 beyond the map.
  tokens = {0};
  int64_t regions = 1, of_region = 1;
  for (size_t axis = 0; axis < map.size(); ++axis) {
    std::vector<int32_t> finer;
    finer.reserve(tokens.size() * counts[axis] * region[axis]);
    for (int64_t i = 0; i < regions; ++i) {
      for (int64_t first = 0; first < counts[axis] * region[axis]; first += region[axis]) {
        for (int64_t j = 0; j < of_region; ++j) {
          const int64_t outer = tokens[i * of_region + j] * map[axis];
          for (int64_t coord = first; coord < first + region[axis]; ++coord) {
            finer.push_back(outer >= 0 && coord < map[axis] ? int32_t(outer + coord) : -1);
          }
        }
      }
    }
    regions *= counts[axis], of_region *= region[axis];
    tokens = std::move(finer);
  }
}

void Regions::fill(TokenLists& lists) const {
  lists.tokens = tokens.data();
  lists.tokens_per_entry = tokens_per_region;
}

RoutedArguments::RoutedArguments(const Checker& checker, RoutedCall call)
    : query(call.query), key(call.key), value(call.value), score(std::move(call.score)) {
  check_tokens(checker);
  check_score(checker);
  check_regions(checker, "region_size", call.region_size, query_map.size());
  check_regions(checker, "kv_region_size", call.kv_region_size, key_map.size());
  heads_of = HeadMap(checker, score.head_map, query, heads, kv_heads);
  if (score.has_outside) {
    const Tensor& graph = call.region_graph;
    checker.rank("region_graph", graph, 4, "(B, heads or 1, regions, topk)");
    int64_t listed = std::max<int64_t>(graph.size(3), 1);
    for (const int64_t size : call.kv_region_size) {
      checker.check(size <= kMaxListed / listed, "kv_region_size has regions of too many tokens, takes at most ",
                    kMaxListed, " in those of a group");
      listed *= size;
    }
  }
  query_regions.emplace(query_map, call.region_size, false);
  key_regions.emplace(key_map, call.kv_region_size, score.has_outside);
  read_graph(checker, call.region_graph);
  query = with_even_tokens(query), key = with_even_tokens(key), value = with_even_tokens(value);
}

void RoutedArguments::check_tokens(const Checker& checker) {
  constexpr const char* kTakes = ", takes 4 to 6 dimensions (B, one to three axes, heads, d)";
  checker.defined("query", query);
  checker.check(query.dim() >= 4 && query.dim() <= 3 + kMaxAxes, "query has shape ", Shape(query), kTakes);
  checker.rank("key", key, query.dim(), "(B, *map, kv_heads, d), as query");
  checker.rank("value", value, query.dim(), "(B, *map, kv_heads, dv), as query");
  check_tensors(checker, *this, query.dim() - 2);
  batch = query.size(0);
  checker.size("key", key, 0, batch, "query's batch size");
  checker.size("value", value, 0, batch, "query's batch size");
  query_map = map_of(query), key_map = map_of(key);
  for (size_t axis = 0; axis < key_map.size(); ++axis) {
    checker.size("value", value, int64_t(axis) + 1, key_map[axis], "key's map");
  }
  for (const auto& [name, map] : {std::pair{"query", &query_map}, {"key", &key_map}}) {
    int64_t tokens = 1;
    for (const int64_t size : *map) {
      checker.check(size == 0 || tokens <= kMaxTokens / size, name, " has too many tokens, takes at most ", kMaxTokens);
      tokens *= size;
    }
  }
}

void RoutedArguments::check_score(const Checker& checker) {
  constexpr const char* kWhere = "with routed keys";
  constexpr std::string_view kTerms[] = {"bias", "key_bias", "multiplier", "key_fill", "value_fill"};
  score.refuse(checker, kTerms, kWhere);
  score.refuse(checker, kOffsetTerms, kWhere);
  checker.check(score.radius == 0, "radius is ", score.radius, ", takes 0 ", kWhere);
  checker.check(score.num_prefix_tokens == 0, "num_prefix_tokens is ", score.num_prefix_tokens, ", takes 0 ", kWhere);
  check_scale(checker, score, query, heads, statistics_type(dtype));
}

void RoutedArguments::read_graph(const Checker& checker, const Tensor& given) {
  checker.strided_like("region_graph", given, query);
  checker.rank("region_graph", given, 4, "(B, heads or 1, regions, topk)");
  const ScalarType type = given.scalar_type();
  checker.check(type == ScalarType::Long || type == ScalarType::Int, "region_graph is ", dtype_text(type),
                ", takes int64 or int32");
  checker.size("region_graph", given, 0, batch, "query's batch size");
  graph_heads = given.size(1), routes = given.size(3);
  checker.check(graph_heads == heads || graph_heads == 1, "region_graph has ", graph_heads, " heads, takes 1 or ",
                heads);
  checker.size("region_graph", given, 2, query_regions->count, "regions of the query's map");
  const Tensor in_order = as_contiguous(given);
  const Integers values{in_order.const_data_ptr(), type == ScalarType::Long};
  graph.resize(given.numel());
  for (size_t i = 0; i < graph.size(); ++i) {
    const int64_t region = values[int64_t(i)];
    checker.check(region >= 0 && region < key_regions->count, "region_graph has region ", region, ", takes 0 to ",
                  key_regions->count - 1);
    graph[i] = int32_t(region);
  }
}

std::vector<int64_t> RoutedArguments::out_sizes() const {
  std::vector<int64_t> sizes = lse_sizes();
  sizes.push_back(value_dim);
  return sizes;
}

std::vector<int64_t> RoutedArguments::lse_sizes() const {
  std::vector<int64_t> sizes = sizes_of(query);
  sizes.pop_back();
  return sizes;
}

void RoutedArguments::fill(ListedParams& params) const {
  Problem& problem = params.problem;
  problem.dtype = dtype;
  problem.batch = batch, problem.heads = heads, problem.kv_heads = kv_heads;
  problem.head_dim = head_dim, problem.value_dim = value_dim;
  problem.axis = {.num_queries = product(query_map), .num_keys = product(key_map)};
  problem.score.scale = score.scale;
  if (score.terms.head_scale) problem.score.head_scale = score.terms.head_scale->const_data_ptr();
  problem.query = map_tokens(query), problem.key = map_tokens(key), problem.value = map_tokens(value);
  params.heads = heads_of.view();
  params.groups = query_regions->count;
  query_regions->fill(params.queries), key_regions->fill(params.keys);
  params.keys.entries = graph.data(), params.keys.count = routes;
  params.keys.head_stride = graph_heads == 1 ? 0 : params.groups * routes;
  params.keys.batch_stride = graph_heads * params.groups * routes;
  params.has_outside = score.has_outside;
}

}  // namespace vitkernels
