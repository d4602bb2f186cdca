// Params of attention to listed keys: which tokens a group of queries sees is data. Plain data, no torch.
//
// The tokens of a map are numbered in row-major order. A group is some queries, each token in one group at most, and
// the keys that all of them see.
#pragma once

#include "attention/dense.h"
#include "common/integers.h"

namespace vitkernels {

// The tokens of each group: those of the entries that a list names.
struct TokenLists {
  Integers entries;                           // [batch, heads or 1, groups, count]; null: group g has entry g
  Integers counts;                            // [batch, heads or 1, groups], entries of a group; null: all of `count`
  int64_t batch_stride = 0, head_stride = 0;  // in lists
  int64_t count = 1;                          // room for entries
  const int32_t* tokens = nullptr;            // [entries, tokens_per_entry]; -1 is no token. Null: an entry is a token
  int64_t tokens_per_entry = 1;

  VK_HOST_DEVICE int64_t max_tokens() const { return count * tokens_per_entry; }

  // Calls f(token) for the tokens of a group, in order.
  template <class Function>
  VK_HOST_DEVICE void for_each_token(int64_t batch, int64_t head, int64_t group, Function&& f) const {
    const int64_t list = batch * batch_stride + head * head_stride + group, listed = counts ? counts[list] : count;
    for (int64_t i = 0; i < listed; ++i) {
      const int64_t entry = entries ? entries[list * count + i] : group;
      if (!tokens) {
        f(int32_t(entry));
        continue;
      }
      const int32_t* of_entry = tokens + entry * tokens_per_entry;
      for (int64_t j = 0; j < tokens_per_entry; ++j) f(of_entry[j]);
    }
  }
};

struct ListedParams {
  Problem problem;  // its axis counts the tokens of the maps
  HostHeadGroups heads;
  int64_t groups = 0;
  TokenLists queries, keys;
  bool has_outside = false;  // keys outside the map are zeros, and so are their values; else they are absent
  TokenTensor out;           // heads
  void* lse = nullptr;       // [batch, queries, heads], contiguous, in the type of the arithmetic

  DType element_type() const { return problem.dtype; }
};

// With at most one query in a group.
struct LoneQueryParams : ListedParams {};

// The backward is partitioned by shapes alone, into batches, kv heads and `splits` ranges of groups. A task writes the
// query gradients of its groups. A key is seen by many groups: each task has partial sums for all keys, to which it adds
// in the order of its groups, and which are added in the order of the splits.
struct ListedBackwardParams {
  ListedParams forward;
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const void* grad_lse = nullptr;  // as lse, or null
  int64_t splits = 1;
  void* parts = nullptr;              // [splits, batch, kv_heads, keys, padded head_dim + padded value_dim]
  double* head_scale_sums = nullptr;  // [batch, splits, heads], or null

  DType element_type() const { return forward.element_type(); }
  int64_t num_tasks() const { return forward.problem.batch * forward.problem.kv_heads * splits; }
};

struct LoneQueryBackwardParams : ListedBackwardParams {};

}  // namespace vitkernels
