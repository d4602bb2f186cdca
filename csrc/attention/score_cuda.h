// Products become logits, in the registers of a warp: scale, terms, and -inf where a query does not see a key.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "attention/attention.h"
#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// What one row of the logits adds and multiplies.
struct TermsOfRow {
  const float *multiplier, *bias, *key_bias;  // null where absent
  int64_t multiplier_stride, bias_stride, key_bias_stride;

  __device__ TermsOfRow(const Score& score, int64_t batch, int64_t head, int64_t query)
      : multiplier(row_of(score.multiplier, batch, head, query)),
        bias(row_of(score.bias, batch, head, query)),
        key_bias(row_of(score.key_bias, batch, head, query)),
        multiplier_stride(score.multiplier.strides.key),
        bias_stride(score.bias.strides.key),
        key_bias_stride(score.key_bias.strides.key) {}

  __device__ float apply(float product, int64_t key) const {
    return logit(product, multiplier ? multiplier[key * multiplier_stride] : 1.0f,
                 bias ? bias[key * bias_stride] : 0.0f, key_bias ? key_bias[key * key_bias_stride] : 0.0f);
  }

 private:
  static __device__ const float* row_of(const ScoreTerm& term, int64_t batch, int64_t head, int64_t query) {
    return term.data ? static_cast<const float*>(term.data) + term.strides.offset(batch, head, query, 0) : nullptr;
  }
};

// `products` (queries,keys) of the queries from `rows.begin` on with the keys from `keys.begin` on become logits.
// `coordinates` gives the (query,key) of each in the tile, which has room for kKeys keys.
template <int kKeys, class Products, class Coordinates>
__device__ void apply_score(Products& products, const Coordinates& coordinates, const Score& score, const Axis& axis,
                            int64_t batch, int64_t head, Range rows, Range keys) {
  const float scale = score.scale_of<float>(head);
  const bool is_whole = keys.end - keys.begin == kKeys && axis.all_keys(rows).end >= keys.end;
  if (!score.has_terms() && is_whole) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(products); ++i) products(i) *= scale;
    return;
  }
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(products); ++r) {
    const int64_t query = rows.begin + cute::get<0>(coordinates(r, 0));
    const bool exists = query < rows.end;
    const Range visible = exists ? intersect(axis.keys(query), keys) : Range{0, 0};
    const TermsOfRow terms(score, batch, head, exists ? query : rows.begin);
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(products); ++c) {
      const int64_t key = keys.begin + cute::get<1>(coordinates(r, c));
      products(r, c) = key >= visible.begin && key < visible.end ? terms.apply(products(r, c) * scale, key)
                                                                 : -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace vitkernels::cuda
