// What the backward kernels share: copies of operand tiles to shared memory, and the step from logits and the gradient
// of P to P and the gradient of the logits, in the registers of a warp.
#pragma once

#include "attention/cuda/score.h"
#include "attention/cuda/tokens.h"
#include "cuda/copy.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/scheduler.h"

namespace vitkernels::cuda {

constexpr Side other_side(Side side) { return side == Side::kKeys ? Side::kQueries : Side::kKeys; }

// Tokens of a sequence, for a query head and the kv head that it reads.
struct TokensOfHead {
  const Sequence& sequence;
  int64_t batch, head, kv_head;
  Range tokens;

  template <Side kSide>
  __device__ Range in_tensor() const {
    return kSide == Side::kQueries ? sequence.query_tokens(tokens) : sequence.key_tokens(tokens);
  }
};

// kRows tokens of both tensors of a side in shared memory, one after the other.
template <class Element, int kRows, int kDim>
struct SharedPair {
  using Tile = SharedTile<Element, kRows, kDim>;
  static constexpr int kElements = 2 * Tile::kElements, kColumns = kDim;

  Element* data;

  // `column` is a multiple of the tile's swizzled columns, which are contiguous.
  template <int kPart = kDim>
  __device__ auto part(int index, int column = 0) const {
    return cute::make_tensor(cute::make_smem_ptr(data + index * int{Tile::kElements} + column * kRows),
                             typename SharedTile<Element, kRows, kPart>::Layout{});  // (rows,columns)
  }
  __device__ auto first() const { return part(0); }
  __device__ auto second() const { return part(1); }

  // Starts the copy of the tokens, of the values the columns from `column` on.
  template <Side kSide, class Copy>
  __device__ void copy(const AttentionBackwardCudaParams& p, const TokensOfHead& of, int column = 0) const {
    constexpr bool kQueries = kSide == Side::kQueries;
    const Problem& problem = p.forward.problem;
    start_tile<Copy>(first(), kQueries ? problem.query : problem.key, of.batch, kQueries ? of.head : of.kv_head,
                     of.template in_tensor<kSide>(), 0, int(problem.head_dim));
    copy_values<kSide, Copy>(p, of, column);
  }

  // The values alone. A launch that does not need them has none.
  template <Side kSide, class Copy>
  __device__ void copy_values(const AttentionBackwardCudaParams& p, const TokensOfHead& of, int column) const {
    constexpr bool kQueries = kSide == Side::kQueries;
    const TokenTensor& values = kQueries ? p.query_value : p.key_value;
    if (values.data) {
      start_tile<Copy>(second(), values, of.batch, kQueries || p.key_value_has_query_heads ? of.head : of.kv_head,
                       of.template in_tensor<kSide>(), column, min(int(p.forward.problem.value_dim) - column, kDim));
    }
    commit_copies();
  }
};

// grads += the product of both sides' values. Where tiles hold only some of the columns, blocks of columns pass through
// them, the first block last, so that it stays. `is_stale`: the owner's values in shared memory are of another head.
template <Side kOwner, class Copy, class Mma, class Grads, class Owned, class Streamed>
__device__ void multiply_values(const Mma& mma, Grads& grads, const AttentionBackwardCudaParams& p, const Owned& owned,
                                const TokensOfHead& of_owner, const Streamed& streamed, const TokensOfHead& of_other,
                                bool is_stale) {
  constexpr int kDim = Owned::kColumns;
  const int value_dim = int(p.forward.problem.value_dim), last = (value_dim - 1) / kDim * kDim;
  for (int column = last; column >= 0; column -= kDim) {
    if (last > 0 || is_stale) {
      __syncthreads();  // all reads of the previous columns are done
      owned.template copy_values<kOwner, Copy>(p, of_owner, column);
      streamed.template copy_values<other_side(kOwner), Copy>(p, of_other, column);
      wait_for_copies<0>();
      __syncthreads();
    }
    multiply_tile(mma, grads, owned.second(), streamed.second(), min(value_dim - column, kDim));
  }
}

// (rows,columns) as (queries,keys).
template <Side kRowsAre, class Rows>
__device__ auto queries_by_keys(Rows&& rows) {
  if constexpr (kRowsAre == Side::kQueries) {
    return cute::make_tensor(rows.data(), rows.layout());
  } else {
    return cute::make_tensor(rows.data(), cute::select<1, 0>(rows.layout()));
  }
}

// The (query,key) of each of a thread's accumulators of a tile of kRows x kColumns, as (queries,keys).
template <Side kRowsAre, int kRows, int kColumns, class Mma>
__device__ auto coordinates_of(const Mma& mma) {
  const auto thread = mma.get_slice(threadIdx.x);
  if constexpr (kRowsAre == Side::kQueries) {
    return by_rows(
        thread.partition_C(cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{})));
  } else {
    const auto by_query = cute::make_identity_tensor(cute::Shape<cute::Int<kColumns>, cute::Int<kRows>>{});
    const auto by_key = cute::make_tensor(by_query.data(), cute::select<1, 0>(by_query.layout()));  // (keys,queries)
    return queries_by_keys<kRowsAre>(by_rows(thread.partition_C(by_key)));
  }
}

// `logits` and `grads`, the gradient of P, both (queries,keys), become P and P * (dP - delta), weighted if kWeighted.
template <bool kWeighted, class Logits, class Grads, class Coordinates>
__device__ void differentiate(Logits& logits, Grads& grads, const Coordinates& coordinates,
                              const AttentionBackwardCudaParams& p, const Sequence& sequence, const LogitTile& tile) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(logits); ++r) {
    const int64_t query = tile.queries.begin + cute::get<0>(coordinates(r, 0));
    // A query that does not exist, or saw no key, has zero probabilities.
    float offset = kInfinity, delta = 0.0f, weight = 1.0f;
    if (query < tile.queries.end) {
      const int64_t row = (sequence.first_row + query) * p.forward.problem.heads + tile.head;
      const float lse = p.forward.lse[row];
      offset = lse == -kInfinity ? kInfinity : lse;
      if (p.delta) delta = p.delta[row];
      if (kWeighted) weight = p.weight(tile.batch, query, tile.head);
    }
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(logits); ++c) logits(r, c) = exp_from(logits(r, c), offset);
    if (kWeighted && p.query_weight) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(logits); ++c) logits(r, c) *= weight;
    }
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(logits); ++c) grads(r, c) = logits(r, c) * (grads(r, c) - delta);
  }
}

// Query heads of one key head add up to one gradient, each times its own factor. What all have in common, the factor of
// largest magnitude, is left to the epilogue: rounded operands keep more bits without it, above all in float16.
struct HeadFactors {
  float largest = 1.0f;

  template <class Call>
  __device__ HeadFactors(const Score& score, const Call& call, Range heads, int64_t kv_head) {
    if (!score.head_scale) return;
    float found = 0.0f;
    for (int64_t head = heads.begin; head < heads.end; ++head) {
      if (call.kv_head(head) == kv_head) found = fmaxf(found, fabsf(score.head_factor<float>(head)));
    }
    if (found > 0.0f) largest = found;
  }

  __device__ float relative(const Score& score, int64_t head) const {
    if (!score.head_scale) return 1.0f;
    const float factor = score.head_factor<float>(head);
    return factor == largest ? 1.0f : factor / largest;
  }
};

// The gradient of the logits becomes that of the scaled products: times `factor` and the multipliers.
template <class Grads, class Coordinates>
__device__ void multiply_grads(Grads& grads, const Coordinates& coordinates, const Score& score, float factor,
                               const LogitTile& tile) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) grads(i) *= factor;
  multiply_by_terms(grads, coordinates, score, tile);
}

}  // namespace vitkernels::cuda
