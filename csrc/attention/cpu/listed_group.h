// The tokens of a group of listed attention on the CPU, and where their rows lie. These are short rows far apart, which
// hardware prefetchers miss: addresses are computed one group ahead, and the rows prefetched during the current group.
#pragma once

#include "attention/listed.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace vitkernels::VK_ISA {

// The rows of some tokens in a tensor. `Element` is const for inputs.
template <class Element>
class ListedRows {
 public:
  ListedRows(int64_t max_count, int64_t dim, Scratch& scratch) : own(scratch.take<intptr_t>(max_count)), dim(dim) {}

  // Tokens outside the map are `outside`.
  void find(const TokenTensor& t, int64_t batch, int64_t head, const int32_t* tokens, int64_t num_tokens,
            Element* outside = nullptr) {
    const intptr_t first = reinterpret_cast<intptr_t>(t.at<Element>(batch, 0, head));
    const intptr_t stride = t.token_stride * int64_t(sizeof(Element));
    for (int64_t i = 0; i < num_tokens; ++i) {
      own[i] = tokens[i] < 0 ? reinterpret_cast<intptr_t>(outside) : first + tokens[i] * stride;
    }
    address = own, distance = 0, count = num_tokens;
  }

  // The same tokens, all inside the map, of a tensor with the token stride of `of_other`: reuses its list.
  template <class Other>
  void find_as(const ListedRows<Other>& other, const Element* first_of_other, const Element* first) {
    address = other.address, count = other.count;
    distance = other.distance + reinterpret_cast<intptr_t>(first) - reinterpret_cast<intptr_t>(first_of_other);
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
  friend class ListedRows;

  intptr_t* own;
  const intptr_t* address = nullptr;
  intptr_t distance = 0;
  int64_t dim;
};

// What a group of one head reads.
template <class S>
class ListedGroup {
 public:
  ListedGroup(const ListedParams& params, Scratch& scratch)
      : query_tokens(scratch.take<int32_t>(params.queries.max_tokens())),
        key_tokens(scratch.take<int32_t>(params.keys.max_tokens())),
        queries(params.queries.max_tokens(), params.problem.head_dim, scratch),
        keys(params.keys.max_tokens(), params.problem.head_dim, scratch),
        values(params.keys.max_tokens(), params.problem.value_dim, scratch) {}

  void find(const ListedParams& params, int64_t of_batch, int64_t of_head, int64_t group, const S* zeros) {
    const Problem& p = params.problem;
    batch = of_batch, head = of_head, kv_head = params.heads.kv_head_of[head];
    int64_t num_queries = 0, num_keys = 0;
    params.queries.for_each_token(batch, head, group, [&](int32_t token) {
      if (token >= 0) query_tokens[num_queries++] = token;
    });
    params.keys.for_each_token(batch, head, group, [&](int32_t token) {
      if (token >= 0 || params.has_outside) key_tokens[num_keys++] = token;
    });
    queries.find(p.query, batch, head, query_tokens, num_queries);
    keys.find(p.key, batch, kv_head, key_tokens, num_keys, zeros);
    if (!params.has_outside && p.value.token_stride == p.key.token_stride) {
      values.find_as(keys, p.key.at<const S>(batch, 0, kv_head), p.value.at<const S>(batch, 0, kv_head));
    } else {
      values.find(p.value, batch, kv_head, key_tokens, num_keys, zeros);
    }
  }

  int64_t batch = 0, head = 0, kv_head = 0;
  int32_t *query_tokens, *key_tokens;
  ListedRows<const S> queries, keys, values;
};

}  // namespace vitkernels::VK_ISA
