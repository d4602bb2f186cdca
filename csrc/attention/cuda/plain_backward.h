// What the backward's fast paths share: the step from logits to P, and the launch by what blocks own.
#pragma once

#include "attention/cuda/owned_tokens.h"
#include "attention/cuda/params.h"
#include "attention/cuda/plain_tasks.h"
#include "attention/cuda/tile_sizes.h"
#include "cuda/fast_softmax.h"

namespace vitkernels::cuda {

// Whether a warp must subtract the LSE of one of its queries before it multiplies by log2(e): its statistic is NaN.
template <int kQueries>
__device__ bool is_any_large(const float (&minus_lse_log2)[kQueries]) {
  float sum = minus_lse_log2[0];
  CUTE_UNROLL
  for (int r = 1; r < kQueries; ++r) sum += minus_lse_log2[r];
  return __any_sync(kAllLanes, sum != sum);
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

template <class Acc>
__device__ void multiply_all(Acc& acc, float factor) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(acc); ++i) acc(i) *= factor;
}

// Of a head, each owned by a block.
template <class Kernel>
int64_t num_owned_tiles(const Problem& p) {
  return ceil_div<int64_t>(Kernel::num_owned(p), Kernel::kOwned);
}

template <class Kernel>
int64_t splits_of_streamed(const Problem& p) {
  return splits_of(num_owned_tiles<Kernel>(p) * p.heads * p.batch, Kernel::num_streamed(p));
}

template <class Kernel, class Function>
cudaError_t launch_owners(Function* kernel, const AttentionBackwardCudaParams& p, const OwnedGrads& grads,
                          int64_t splits, cudaStream_t stream) {
  const Problem& problem = p.forward.problem;
  const int64_t tiles = num_owned_tiles<Kernel>(problem);
  return launch_tasks(kernel, tiles * problem.heads * problem.batch * splits, Kernel::kThreads, Kernel::kSharedBytes,
                      stream, p, grads, plain_tasks(problem, tiles, splits));
}

}  // namespace vitkernels::cuda
