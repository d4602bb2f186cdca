// The tokens that a block of a backward kernel owns, and how their gradients leave it.
#pragma once

#include "attention/cuda/params.h"
#include "cuda/epilogue.h"
#include "cuda/fragments.h"

namespace vitkernels::cuda {

// Of one head, and the part of their gradients that the block sums.
struct OwnedTokens {
  int64_t batch, head, part, first;
  int rows, columns, first_column = 0;
};

// The (row,column) of each of a thread's accumulators of a tile, as (rows,columns).
template <class Mma, class Shape>
__device__ auto owned_coordinates(const Mma& mma, const Shape& shape) {
  return by_rows(mma.get_slice(thread_index()).partition_C(cute::make_identity_tensor(shape)));  // (rows,columns)
}

// Adds what reaches queries on the offset grid through the relative logits, to accumulators whose coordinates are `at`.
template <class Acc, class Coordinates>
__device__ void add_relative_grad(Acc& grad, const Coordinates& at, const AttentionBackwardCudaParams& p,
                                  const OwnedTokens& tokens) {
  const int64_t heads = p.forward.problem.heads, dim = p.forward.problem.head_dim;
  const OffsetGrid& grid = p.forward.problem.score.by_offset.grid;
  const float* const relative = p.relative_grad_query + (tokens.batch * heads + tokens.head) * grid.num_tokens() * dim;
  cute::Tensor rows = by_rows(grad);  // (rows,columns)
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(rows); ++r) {
    const int row = cute::get<0>(at(r, 0));
    const int64_t token = tokens.first + row - grid.num_prefix;
    if (row >= tokens.rows || token < 0) continue;
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(rows); ++c) {
      const int column = tokens.first_column + int(cute::get<1>(at(r, c)));
      if (column < dim) rows(r, c) += relative[token * dim + column];
    }
  }
}

// Gradients leave through the shared memory of the owned tokens; partial sums leave from registers.
template <int kThreads, class Mma, class Acc, class Shared>
__device__ void store_owned(const Mma& mma, const Acc& grad, Shared& sT, const TokenTensor& target,
                            const PartialSums& parts, const OwnedTokens& tokens) {
  using Element = typename Shared::value_type;
  const int64_t offset = target.offset(tokens.batch, tokens.first, tokens.head) + tokens.first_column;
  if (parts.data) {
    const auto at = owned_coordinates(mma, cute::product_each(shape(sT)));  // (rows,columns)
    store_acc(by_rows(grad), at, parts.part(tokens.part) + offset, target.token_stride, tokens.rows, tokens.columns);
  } else {
    store_tile<kThreads>(mma, grad, sT, static_cast<Element*>(target.data) + offset, target.token_stride, tokens.rows,
                         tokens.columns, target.is_aligned);
  }
}

}  // namespace vitkernels::cuda
