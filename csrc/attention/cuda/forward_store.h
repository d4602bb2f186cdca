// The end of a forward kernel: from accumulators and softmax statistics to the results in memory.
#pragma once

#include "attention/cuda/params.h"
#include "cuda/epilogue.h"
#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// Where the results of a query tile go.
struct ForwardResult {
  int64_t batch, head, split;
  int64_t first_row, first_token;  // among the rows of the statistics, and in `out`
  int64_t first_column;
  int rows, columns;
};

__device__ inline void store_statistics(const AttentionCudaParams& p, int64_t split, int64_t row, int64_t head,
                                        float max, float sum) {
  const int64_t i = (split * p.num_rows() + row) * p.problem.heads + head;
  if (p.splits == 1) {
    p.lse[i] = lse_of(max, sum);
  } else {
    p.split_max[i] = max, p.split_sum[i] = sum;
  }
}

// out / sum, and the statistics. Results leave through the shared memory of the queries, `sO`.
template <int kThreads, class Mma, class Out, class Softmax, class Shared>
__device__ void store_forward(const AttentionCudaParams& p, const ForwardResult& to, const Mma& mma, Out& out,
                              const Softmax& softmax, Shared& sO) {
  using Element = typename Shared::value_type;
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor out_rows = by_rows(out);  // (rows,columns)
  cute::Tensor cO = by_rows(
      thread.partition_C(cute::make_identity_tensor(cute::product_each(shape(sO)))));  // (rows,columns) -> (row,column)
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(out_rows); ++r) {
    const float factor = softmax.sum[r] == 0.0f ? 0.0f : 1.0f / softmax.sum[r];
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(out_rows); ++c) {
      // A row that saw no key is zero, whatever its accumulators hold.
      out_rows(r, c) = softmax.sum[r] == 0.0f ? 0.0f : out_rows(r, c) * factor;
    }
    const int row = cute::get<0>(cO(r, 0));
    if (cute::get<1>(cO(r, 0)) == 0 && row < to.rows && to.first_column == 0) {
      store_statistics(p, to.split, to.first_row + row, to.head, softmax.max[r], softmax.sum[r]);
    }
  }
  if (p.splits > 1) {
    const int64_t first = (to.split * p.num_rows() + to.first_row) * p.problem.heads + to.head;
    const int64_t dim = p.problem.value_dim;
    store_acc(out_rows, cO, p.split_out + first * dim + to.first_column, p.problem.heads * dim, to.rows, to.columns);
    return;
  }
  store_tile<kThreads>(mma, out, sO, p.out.at<Element>(to.batch, to.first_token, to.head) + to.first_column,
                       p.out.token_stride, to.rows, to.columns, p.out.is_aligned);
}

}  // namespace vitkernels::cuda
