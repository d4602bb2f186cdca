// What every backward kernel shares: a tile's operands on their way to shared memory, and the way from logits and the
// gradient of P to P and the gradient of the logits, in the registers of a warp.
#pragma once

#include "attention/cuda/score.h"
#include "attention/cuda/tokens.h"
#include "cuda/copy.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/scheduler.h"

namespace vitkernels::cuda {

constexpr Side other_side(Side side) { return side == Side::kKeys ? Side::kQueries : Side::kKeys; }

// Tokens of an entry, for a query head and the kv head that it reads.
struct TokensOfHead {
  const Sequence& sequence;
  int64_t batch, head, kv_head;
  Range tokens;

  template <Side kSide>
  __device__ Range in_tensor() const {
    return kSide == Side::kQueries ? sequence.query_tokens(tokens) : sequence.key_tokens(tokens);
  }
};

// kRows tokens of both tensors of a side in shared memory, one behind the other.
template <class Element, int kRows, int kDim>
struct SharedPair {
  using Tile = SharedTile<Element, kRows, kDim>;
  static constexpr int kElements = 2 * Tile::kElements, kColumns = kDim;

  Element* data;

  // `column` begins a whole number of the tile's chunks: those lie one behind the other.
  template <int kPart = kDim>
  __device__ auto part(int index, int column = 0) const {
    return cute::make_tensor(cute::make_smem_ptr(data + index * int{Tile::kElements} + column * kRows),
                             typename SharedTile<Element, kRows, kPart>::Layout{});  // (rows,columns)
  }
  __device__ auto first() const { return part(0); }
  __device__ auto second() const { return part(1); }

  // Starts the copy of an entry's tokens, of the values the columns from `column` on.
  template <Side kSide, class Copy>
  __device__ void copy(const AttentionBackwardCudaParams& p, const TokensOfHead& of, int column = 0) const {
    constexpr bool kQueries = kSide == Side::kQueries;
    start_tile<Copy>(first(), kQueries ? p.query : p.key, of.batch, kQueries ? of.head : of.kv_head,
                     of.template in_tensor<kSide>(), 0, int(p.head_dim));
    copy_values<kSide, Copy>(p, of, column);
  }

  // Those of the values alone. A kernel that has no use for them is not given any.
  template <Side kSide, class Copy>
  __device__ void copy_values(const AttentionBackwardCudaParams& p, const TokensOfHead& of, int column) const {
    constexpr bool kQueries = kSide == Side::kQueries;
    const TokenTensor& values = kQueries ? p.query_value : p.key_value;
    if (values.data) {
      start_tile<Copy>(second(), values, of.batch, kQueries || p.key_value_has_query_heads ? of.head : of.kv_head,
                       of.template in_tensor<kSide>(), column, min(int(p.value_dim) - column, kDim));
    }
    commit_copies();
  }
};

// grads += the product of both sides' values. Where the tiles hold some of the columns only, all of them pass through, the
// first ones last, so that these stay. `is_stale`: the owner's are of another head.
template <Side kOwner, class Copy, class Mma, class Grads, class Owned, class Streamed>
__device__ void multiply_values(const Mma& mma, Grads& grads, const AttentionBackwardCudaParams& p, const Owned& owned,
                                const TokensOfHead& of_owner, const Streamed& streamed, const TokensOfHead& of_other,
                                bool is_stale) {
  constexpr int kDim = Owned::kColumns;
  const int last = (int(p.value_dim) - 1) / kDim * kDim;
  for (int column = last; column >= 0; column -= kDim) {
    if (last > 0 || is_stale) {
      __syncthreads();  // nobody reads what was there before
      owned.template copy_values<kOwner, Copy>(p, of_owner, column);
      streamed.template copy_values<other_side(kOwner), Copy>(p, of_other, column);
      wait_for_copies<0>();
      __syncthreads();
    }
    multiply_tile(mma, grads, owned.second(), streamed.second(), min(int(p.value_dim) - column, kDim));
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

// For a thread, the (query,key) of each sum of a tile of kRows x kColumns, as (queries,keys).
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
                              const AttentionBackwardCudaParams& p, const Sequence& sequence, int64_t batch,
                              int64_t head, Range rows) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(logits); ++r) {
    const int64_t query = rows.begin + cute::get<0>(coordinates(r, 0));
    // A query that does not exist, or saw no key, has probabilities of zero.
    float offset = kInfinity, delta = 0.0f, weight = 1.0f;
    if (query < rows.end) {
      const int64_t row = (sequence.first_row + query) * p.heads + head;
      const float lse = static_cast<const float*>(p.lse)[row];
      offset = lse == -kInfinity ? kInfinity : lse;
      if (p.delta) delta = p.delta[row];
      if (kWeighted) weight = p.weight(batch, query, head);
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

// The gradient of the logits becomes that of the scaled products: times `factor` and the multipliers.
template <class Grads, class Coordinates>
__device__ void multiply_grads(Grads& grads, const Coordinates& coordinates, const Score& score, float factor,
                               int64_t batch, int64_t head, Range rows, Range keys) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) grads(i) *= factor;
  multiply_by_terms(grads, coordinates, score, {batch, head, rows, keys});
}

}  // namespace vitkernels::cuda
