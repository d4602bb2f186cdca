// From the tensors of attention to listed keys to the Params of its kernels, with all checks.
#pragma once

#include "attention/listed.h"
#include "attention/op/arguments.h"

namespace vitkernels {

// What operators with listed keys have in common. Owns what Params points to.
class ListedArguments {
 public:
  // `takes`: the axes of tokens, in an error. `where`: what the score's terms are refused for.
  ListedArguments(const Checker& checker, const Tensor& query, const Tensor& key, const Tensor& value,
                  ScoreArguments score, const char* where);

  void fill(ListedParams& params) const;   // but for the lists
  std::vector<int64_t> out_sizes() const;  // [B, *map, heads, dv]
  std::vector<int64_t> lse_sizes() const;

  Tensor query, key, value;  // with even tokens
  ScoreArguments score;
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;

 protected:
  int64_t num_queries() const;
  int64_t num_keys() const;

  std::vector<int64_t> query_map, key_map;

 private:
  void check_tokens(const Checker& checker);
  void check_score(const Checker& checker, const char* where);

  HeadMap heads_of;
};

// Lists of integers [batch, heads or 1, groups, count], each from 0 to `end` - 1.
class IntegerLists {
 public:
  // `numbers`: what one of them is, in an error.
  IntegerLists(const Checker& checker, const char* name, const Tensor& t, const ListedArguments& args, int64_t end,
               const char* numbers);

  // How many of a list count.
  void cut(const Checker& checker, const char* name, const Tensor& t);
  void fill(TokenLists& lists) const;

  int64_t of_heads, groups, count;

 private:
  Tensor values;
  OptionalTensor counts;
};

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

class RoutedArguments : public ListedArguments {
 public:
  RoutedArguments(const Checker& checker, RoutedCall call);
  void fill(ListedParams& params) const;

 private:
  std::optional<Regions> query_regions, key_regions;
  std::optional<IntegerLists> graph;
};

class IndexedArguments : public ListedArguments {
 public:
  IndexedArguments(const Checker& checker, IndexedCall call);
  void fill(ListedParams& params) const;

 private:
  std::optional<IntegerLists> keys;
  std::optional<Regions> groups;  // of neighboring queries
};

// The sizes of the map of a tensor [B, *map, heads, dim].
std::vector<int64_t> checked_map(const Checker& checker, const char* name, const Tensor& t);

void check_regions(const Checker& checker, const char* name, const std::vector<int64_t>& region, size_t axes);

// A tensor [B, *map, heads, dim] whose tokens are evenly spaced: itself, or a copy.
Tensor with_even_tokens(const Tensor& t);

// Of such a tensor.
TokenTensor map_tokens(const Tensor& t);

}  // namespace vitkernels
