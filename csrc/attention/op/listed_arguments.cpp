#include "attention/op/listed_arguments.h"

#include <atomic>
#include <limits>

#include "common/range.h"

namespace vitkernels {
namespace {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();  // of a map
constexpr int64_t kMaxListed = int64_t(1) << 26;                     // keys of a group

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

// Whether integers are from 0 to end - 1.
template <class Int>
bool all_below(const Int* data, int64_t count, int64_t end) {
  Int bits = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) bits |= data[i], largest = std::max(largest, data[i]);
  return bits >= 0 && largest < end;  // one below zero would have set the sign
}

// Contiguous integers, each from 0 to end - 1, which are `numbers`.
Tensor checked_integers(const Checker& checker, const char* name, const Tensor& t, int64_t end, const char* numbers) {
  const ScalarType type = t.scalar_type();
  checker.check(type == ScalarType::Long || type == ScalarType::Int, name, " is ", dtype_text(type),
                ", takes int64 or int32");
  const Tensor in_order = as_contiguous(t);
  const Integers given = integers(in_order);
  constexpr int64_t kGrain = int64_t(1) << 15;
  std::atomic<bool> all_exist = true;
  torch::stable::parallel_for(0, t.numel(), kGrain, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    const bool exist = given.is_int64 ? all_below(static_cast<const int64_t*>(given.data) + first, count, end)
                                      : all_below(static_cast<const int32_t*>(given.data) + first, count, end);
    if (!exist) all_exist = false;
  });
  for (int64_t i = 0; !all_exist && i < t.numel(); ++i) {
    checker.check(given[i] >= 0 && given[i] < end, name, " has ", numbers, given[i], ", takes 0 to ", end - 1);
  }
  return in_order;
}

}  // namespace

std::vector<int64_t> checked_map(const Checker& checker, const char* name, const Tensor& t) {
  const std::vector<int64_t> sizes = sizes_of(t), map(sizes.begin() + 1, sizes.end() - 2);
  int64_t tokens = 1;
  for (const int64_t size : map) {
    checker.check(size == 0 || tokens <= kMaxTokens / size, name, " has too many tokens, takes at most ", kMaxTokens);
    tokens *= size;
  }
  return map;
}

void check_regions(const Checker& checker, const char* name, const std::vector<int64_t>& region, size_t axes) {
  checker.check(region.size() == axes, name, " has ", region.size(), " sizes, takes ", axes,
                ", one for each axis of the map");
  for (const int64_t size : region) checker.check(size > 0, name, " has ", size, ", takes sizes of at least 1");
}

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

ListedArguments::ListedArguments(const Checker& checker, const Tensor& query, const Tensor& key, const Tensor& value,
                                 ScoreArguments score, const char* where)
    : query(query), key(key), value(value), score(std::move(score)) {
  check_tokens(checker);
  check_score(checker, where);
  heads_of = HeadMap(checker, this->score.head_map, query, heads, kv_heads);
  this->query = with_even_tokens(query), this->key = with_even_tokens(key), this->value = with_even_tokens(value);
}

void ListedArguments::check_tokens(const Checker& checker) {
  constexpr const char* kTakes = ", takes 4 to 6 dimensions (B, one to three axes, heads, d)";
  checker.defined("query", query);
  checker.check(query.dim() >= 4 && query.dim() <= 3 + kMaxAxes, "query has shape ", Shape(query), kTakes);
  checker.rank("key", key, query.dim(), "(B, *map, kv_heads, d), as query");
  checker.rank("value", value, query.dim(), "(B, *map, kv_heads, dv), as query");
  check_tensors(checker, *this, query.dim() - 2);
  batch = query.size(0);
  checker.size("key", key, 0, batch, "query's batch size");
  checker.size("value", value, 0, batch, "query's batch size");
  query_map = checked_map(checker, "query", query), key_map = checked_map(checker, "key", key);
  for (size_t axis = 0; axis < key_map.size(); ++axis) {
    checker.size("value", value, int64_t(axis) + 1, key_map[axis], "key's map");
  }
}

void ListedArguments::check_score(const Checker& checker, const char* where) {
  constexpr std::string_view kTerms[] = {"bias", "key_bias", "multiplier", "key_fill", "value_fill"};
  score.refuse(checker, kTerms, where);
  score.refuse(checker, kOffsetTerms, where);
  checker.check(score.radius == 0, "radius is ", score.radius, ", takes 0 ", where);
  checker.check(score.num_prefix_tokens == 0, "num_prefix_tokens is ", score.num_prefix_tokens, ", takes 0 ", where);
  check_scale(checker, score, query, heads, statistics_type(dtype));
}

int64_t ListedArguments::num_queries() const { return product(query_map); }
int64_t ListedArguments::num_keys() const { return product(key_map); }

std::vector<int64_t> ListedArguments::out_sizes() const {
  std::vector<int64_t> sizes = lse_sizes();
  sizes.push_back(value_dim);
  return sizes;
}

std::vector<int64_t> ListedArguments::lse_sizes() const {
  std::vector<int64_t> sizes = sizes_of(query);
  sizes.pop_back();
  return sizes;
}

void ListedArguments::fill(ListedParams& params) const {
  Problem& problem = params.problem;
  problem.dtype = dtype;
  problem.batch = batch, problem.heads = heads, problem.kv_heads = kv_heads;
  problem.head_dim = head_dim, problem.value_dim = value_dim;
  problem.axis = {.num_queries = num_queries(), .num_keys = num_keys()};
  problem.score.scale = score.scale;
  if (score.terms.head_scale) problem.score.head_scale = score.terms.head_scale->const_data_ptr();
  problem.query = map_tokens(query), problem.key = map_tokens(key), problem.value = map_tokens(value);
  params.heads = heads_of.view();
  params.has_outside = score.has_outside;
}

IntegerLists::IntegerLists(const Checker& checker, const char* name, const Tensor& t, const ListedArguments& args,
                           int64_t end, const char* numbers) {
  checker.strided_like(name, t, args.query);
  checker.rank(name, t, 4, "(B, heads or 1, groups, integers)");
  checker.size(name, t, 0, args.batch, "query's batch size");
  of_heads = t.size(1), groups = t.size(2), count = t.size(3);
  checker.check(of_heads == args.heads || of_heads == 1, name, " has ", of_heads, " heads, takes 1 or ", args.heads);
  values = checked_integers(checker, name, t, end, numbers);
}

void IntegerLists::cut(const Checker& checker, const char* name, const Tensor& t) {
  checker.strided_like(name, t, values);
  checker.shape(name, t, {values.size(0), of_heads, groups});
  counts = checked_integers(checker, name, t, count + 1, "");
}

void IntegerLists::fill(TokenLists& lists) const {
  lists.entries = integers(values), lists.count = count;
  if (counts) lists.counts = integers(*counts);
  lists.head_stride = of_heads == 1 ? 0 : groups;
  lists.batch_stride = of_heads * groups;
}

RoutedArguments::RoutedArguments(const Checker& checker, RoutedCall call)
    : ListedArguments(checker, call.query, call.key, call.value, std::move(call.score), "with routed keys") {
  check_regions(checker, "region_size", call.region_size, query_map.size());
  check_regions(checker, "kv_region_size", call.kv_region_size, key_map.size());
  if (score.has_outside) {
    checker.rank("region_graph", call.region_graph, 4, "(B, heads or 1, regions, topk)");
    int64_t listed = std::max<int64_t>(call.region_graph.size(3), 1);
    for (const int64_t size : call.kv_region_size) {
      checker.check(size <= kMaxListed / listed, "kv_region_size has regions of too many tokens, takes at most ",
                    kMaxListed, " in those of a group");
      listed *= size;
    }
  }
  query_regions.emplace(query_map, call.region_size, false);
  key_regions.emplace(key_map, call.kv_region_size, score.has_outside);
  graph.emplace(checker, "region_graph", call.region_graph, *this, key_regions->count, "region ");
  checker.size("region_graph", call.region_graph, 2, query_regions->count, "regions of the query's map");
}

void RoutedArguments::fill(ListedParams& params) const {
  ListedArguments::fill(params);
  params.groups = query_regions->count;
  query_regions->fill(params.queries), key_regions->fill(params.keys);
  graph->fill(params.keys);
}

IndexedArguments::IndexedArguments(const Checker& checker, IndexedCall call)
    : ListedArguments(checker, call.query, call.key, call.value, std::move(call.score), "with indexed keys") {
  checker.rank("query", query, 4, "(B, Nq, heads, d)");
  checker.check(!score.has_outside, "has_outside is True, takes False with indexed keys");
  keys.emplace(checker, "key_index", call.key_index, *this, num_keys(), "key ");
  if (call.key_count) keys->cut(checker, "key_count", *call.key_count);
  const bool is_whole = num_queries() == 0 || (keys->groups > 0 && num_queries() % keys->groups == 0);
  checker.check(is_whole, "key_index has ", keys->groups, " groups, takes a divisor of query's ", num_queries(),
                " tokens");
  groups.emplace(query_map, std::vector{std::max<int64_t>(num_queries() / std::max<int64_t>(keys->groups, 1), 1)},
                 false);
}

void IndexedArguments::fill(ListedParams& params) const {
  ListedArguments::fill(params);
  params.groups = groups->count;
  groups->fill(params.queries), keys->fill(params.keys);
}

}  // namespace vitkernels
