// The values V' of a transposed attention on the CPU, for its forward and backward.
#pragma once

#include "attention/dense.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {

// target [rows, padded dv] = w V' of the queries `rows`.
template <class T, class S>
void pack_weighted_values(const Problem& p, const QueryWeight& weight, int64_t batch, int64_t head, Range rows,
                          T* target, int64_t stride) {
  for (int64_t query = rows.begin; query < rows.end; ++query, target += stride) {
    pack_rows<T>(EvenRows{p.value.at<const S>(batch, query, head), 0}, 1, p.value_dim, weight.at<T>(batch, head, query),
                 target, stride);
  }
}

}  // namespace vitkernels::VK_ISA
