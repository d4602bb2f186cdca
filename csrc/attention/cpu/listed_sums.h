// The partial sums of key gradients that a task of the listed backward adds to, and how they become gradients.
#pragma once

#include "attention/cpu/differentiate.h"
#include "attention/listed.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {

template <class T>
class ListedSums {
 public:
  // Rows of sums are `query_width` and `value_width` wide, whole vectors.
  ListedSums(const ListedBackwardParams& params, int64_t query_width, int64_t value_width)
      : query_width(query_width), value_width(value_width), params(params) {}

  int64_t size() const { return params.num_tasks() * part_size * int64_t(sizeof(T)); }

  void start(int64_t task) {
    split = task % params.splits, kv_head = task / params.splits % p.kv_heads;
    batch = task / params.splits / p.kv_heads;
    keys = part(split, batch, kv_head), values = keys + p.num_keys() * query_width;
    std::fill_n(keys, part_size, T(0));
  }

  // Calls f(batch, head, groups) for the task's heads, which returns the gradient of the head's scale.
  template <class Function>
  void for_each_head(Function&& f) {
    const HostHeadGroups& heads = forward.heads;
    const Range groups{forward.groups * split / params.splits, forward.groups * (split + 1) / params.splits};
    for (int64_t i = heads.first_head[kv_head]; i < heads.first_head[kv_head + 1]; ++i) {
      const int64_t head = heads.head_list[i];
      const double of_scale = f(batch, head, groups);
      if (params.head_scale_sums) params.head_scale_sums[(batch * params.splits + split) * p.heads + head] = of_scale;
    }
  }

  // dK and dV of some (batch, kv head) pairs.
  template <class S>
  void finish(int64_t begin, int64_t end) const {
    const int64_t of_splits = p.batch * p.kv_heads * part_size;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t of_batch = pair / p.kv_heads, of_head = pair % p.kv_heads;
      T *of_keys = part(0, of_batch, of_head), *of_values = of_keys + p.num_keys() * query_width;
      sum_splits(of_keys, part_size, params.splits, of_splits);
      unpack_rows<T>(of_keys, query_width, p.num_keys(), p.head_dim, T(1), params.grad_key.at<S>(of_batch, 0, of_head),
                     params.grad_key.token_stride);
      unpack_rows<T>(of_values, value_width, p.num_keys(), p.value_dim, T(1),
                     params.grad_value.at<S>(of_batch, 0, of_head), params.grad_value.token_stride);
    }
  }

  const int64_t query_width, value_width;
  T *keys = nullptr, *values = nullptr;  // of the task

 private:
  T* part(int64_t of_split, int64_t of_batch, int64_t of_head) const {
    return static_cast<T*>(params.parts) + ((of_split * p.batch + of_batch) * p.kv_heads + of_head) * part_size;
  }

  const ListedBackwardParams& params;
  const ListedParams& forward = params.forward;
  const Problem& p = forward.problem;
  const int64_t part_size = p.num_keys() * (query_width + value_width);
  int64_t split = 0, batch = 0, kv_head = 0;
};

}  // namespace vitkernels::VK_ISA
