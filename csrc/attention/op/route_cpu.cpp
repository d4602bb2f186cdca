// The operator vitkernels::bilevel_route on the CPU.
#include "attention/op/listed_arguments.h"
#include "attention/route.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

// One side of the routing: its tensor, cut into regions. Owns what Params points to.
class RoutedTokens {
 public:
  RoutedTokens(const Checker& checker, const char* name, const Tensor& t, const char* region_name,
               const std::vector<int64_t>& region)
      : rows(with_even_tokens(t)), dtype(checker.element_type(name, t)) {
    const std::vector<int64_t> map = checked_map(checker, name, t);
    check_regions(checker, region_name, region, map.size());
    regions.emplace(map, region, false);
  }

  int64_t num_regions() const { return regions->count; }

  // The means, in panels of so many regions.
  RegionMeansParams find_means(int64_t panel) {
    RegionMeansParams params{.dtype = dtype,
                             .batch = rows.size(0),
                             .heads = rows.size(rows.dim() - 2),
                             .head_dim = rows.size(rows.dim() - 1),
                             .regions = num_regions(),
                             .rows = map_tokens(rows),
                             .panel = panel};
    TokenLists lists;
    regions->fill(lists);
    params.tokens = lists.tokens, params.tokens_per_region = lists.tokens_per_entry;
    means = empty_as(rows, {params.batch, params.padded_regions() * params.channels()}, statistics_type(dtype));
    params.means = means.mutable_data_ptr();
    run_kernel(kernel<RegionMeansParams>(), params, params.batch * params.regions, 1, rows);
    return params;
  }

 private:
  Tensor rows, means;
  DType dtype;
  std::optional<Regions> regions;
};

void bilevel_route(Call& call) {
  const Checker& checker = call.checker;
  const Tensor query = call.take<Tensor>("query"), key = call.take<Tensor>("key");
  const auto region = call.take<std::vector<int64_t>>("region_size");
  const auto kv_region = call.take<std::vector<int64_t>>("kv_region_size");
  const int64_t topk = call.take<int64_t>("topk");
  checker.defined("query", query);
  const int64_t rank = query.dim();
  checker.check(rank >= 4 && rank <= 3 + kMaxAxes, "query has shape ", Shape(query),
                ", takes 4 to 6 dimensions (B, one to three axes, heads, d)");
  checker.rank("key", key, rank, "(B, *map, heads, d), as query");
  for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}}) {
    checker.tensor(name, *t, query, query.scalar_type());
  }
  checker.size("key", key, 0, query.size(0), "query's batch size");
  checker.size("key", key, rank - 2, query.size(rank - 2), "query's number of heads");
  checker.size("key", key, rank - 1, query.size(rank - 1), "query's head dimension");
  RoutedTokens queries(checker, "query", query, "region_size", region);
  RoutedTokens keys(checker, "key", key, "kv_region_size", kv_region);
  checker.check(topk >= 0 && topk <= keys.num_regions(), "topk is ", topk, ", takes 0 to the number of regions ",
                keys.num_regions());

  const int64_t batch = query.size(0), blocks = (queries.num_regions() + kRouteRows - 1) / kRouteRows;
  const Tensor graph = empty_as(query, {batch, 1, queries.num_regions(), topk}, ScalarType::Long);
  if (graph.numel() > 0) {
    const RouteParams params{.queries = queries.find_means(1),
                             .keys = keys.find_means(kRoutePanel),
                             .topk = topk,
                             .graph = static_cast<int64_t*>(graph.mutable_data_ptr())};
    run_kernel(kernel<RouteParams>(), params, batch * blocks, 1, query);
  }
  call.give(graph, "");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("bilevel_route", &boxed<"bilevel_route", bilevel_route>);
}
