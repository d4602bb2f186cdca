// What the backward's fast paths share: the statistics of queries, and the step from logits and the gradient of P to P
// and the gradient of the logits.
#pragma once

#include "attention/cuda/params.h"
#include "cuda/epilogue.h"
#include "cuda/fast_softmax.h"

namespace vitkernels::cuda {

// Whether a warp must subtract the LSE of one of its queries before it multiplies by log2(e) (fast_softmax.h).
template <int kQueries>
__device__ bool is_any_large(const float (&lse_log2)[kQueries]) {
  float largest = 0.0f;
  CUTE_UNROLL
  for (int r = 0; r < kQueries; ++r) largest = fmaxf(largest, fabsf(lse_log2[r]));
  return __any_sync(kAllLanes, !(largest <= kMaxExpOffset));
}

// Logits (queries,keys) become P. Without a bias, they are products that still lack `scale`. `minus_lse_log2` is of the
// thread's queries; `lse(r)` is called rarely, if `is_large`.
template <bool kHasBias, int kQueries, class Logits, class Lse>
__device__ __forceinline__ void exponentiate_plain(Logits& logits, float (&minus_lse_log2)[kQueries], Lse&& lse,
                                                   float scale, bool is_large) {
  static_assert(decltype(cute::size<0>(logits))::value == kQueries);
  float unit = kHasBias ? kLog2e : scale * kLog2e;
  if (is_large) {
    rarely();
    unit = kLog2e;
    CUTE_UNROLL
    for (int r = 0; r < kQueries; ++r) {
      const float offset = lse(r);
      minus_lse_log2[r] = 0.0f;
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) {
        logits(r, c) = (kHasBias ? logits(r, c) : logits(r, c) * scale) - offset;
      }
    }
  }
  CUTE_UNROLL
  for (int r = 0; r < kQueries; ++r) {
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(logits); ++c) {
      logits(r, c) = exp2_of(fmaf(logits(r, c), unit, minus_lse_log2[r]));
    }
  }
}

// The tokens that a block owns, of one head, and a part of their gradients.
struct OwnedTokens {
  int64_t batch, head, part, first;
  int rows, columns;
};

template <class Acc>
__device__ void multiply_all(Acc& acc, float factor) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(acc); ++i) acc(i) *= factor;
}

// Gradients leave through the shared memory of the owned tokens; partial sums leave from registers.
template <int kThreads, class Mma, class Acc, class Shared>
__device__ void store_owned(const Mma& mma, const Acc& grad, Shared& sT, const TokenTensor& target,
                            const PartialSums& parts, const OwnedTokens& tokens) {
  using Element = typename Shared::value_type;
  const int64_t offset = target.offset(tokens.batch, tokens.first, tokens.head);
  if (parts.data) {
    const auto at =
        by_rows(mma.get_slice(thread_index())
                    .partition_C(cute::make_identity_tensor(cute::product_each(shape(sT)))));  // (rows,columns)
    store_acc(by_rows(grad), at, parts.part(tokens.part) + offset, target.token_stride, tokens.rows, tokens.columns);
  } else {
    store_tile<kThreads>(mma, grad, sT, static_cast<Element*>(target.data) + offset, target.token_stride, tokens.rows,
                         tokens.columns, target.is_aligned);
  }
}

}  // namespace vitkernels::cuda
