// The values V' of a transposed attention on the CPU, for its forward and backward.
#pragma once

#include "attention/dense.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {

template <class T>
VK_INLINE T query_weight(const AttentionTransposedParams& p, int64_t batch, int64_t head, int64_t query) {
  if (!p.query_weight) return T(1);
  return static_cast<const T*>(p.query_weight)[p.weight_strides.offset(batch, head, query, 0)];
}

// target [rows, padded dv] = w V' of the queries `rows`.
template <class T, class S>
void pack_weighted_values(const AttentionTransposedParams& p, int64_t batch, int64_t head, Range rows, T* target,
                          int64_t stride) {
  for (int64_t query = rows.begin; query < rows.end; ++query, target += stride) {
    pack_rows<T>(EvenRows{p.value.at<const S>(batch, query, head), 0}, 1, p.value_dim,
                 query_weight<T>(p, batch, head, query), target, stride);
  }
}

}  // namespace vitkernels::VK_ISA
