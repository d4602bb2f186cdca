// From the tensors of regional_routing_attention to the Params of its kernels, with all checks.
#pragma once

#include "attention/listed.h"
#include "attention/op/arguments.h"

namespace vitkernels {

// A map cut into regions, which its borders may cut short.
class Regions {
 public:
  // `keeps_outside`: the tokens of a region beyond the map count.
  Regions(const std::vector<int64_t>& map, std::vector<int64_t> region, bool keeps_outside);

  void fill(TokenLists& lists) const;

  int64_t count = 1;
  int64_t tokens_per_region = 1;

 private:
  std::vector<int32_t> tokens;  // [count, tokens_per_region]; -1 lies outside the map
};

// Owns what Params points to.
class RoutedArguments {
 public:
  RoutedArguments(const Checker& checker, RoutedCall call);

  void fill(ListedParams& params) const;
  std::vector<int64_t> out_sizes() const;  // [B, *map, heads, dv]
  std::vector<int64_t> lse_sizes() const;

  Tensor query, key, value;
  ScoreArguments score;
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;

 private:
  void check_tokens(const Checker& checker);
  void check_score(const Checker& checker);
  void read_graph(const Checker& checker, const Tensor& graph);

  std::vector<int64_t> query_map, key_map;
  std::optional<Regions> query_regions, key_regions;
  std::vector<int32_t> graph;  // [batch, graph_heads, query regions, routes]
  int64_t graph_heads, routes;
  HeadMap heads_of;
};

// A tensor [B, *map, heads, dim] whose tokens are evenly spaced: itself, or a copy.
Tensor with_even_tokens(const Tensor& t);

// Of such a tensor.
TokenTensor map_tokens(const Tensor& t);

}  // namespace vitkernels
