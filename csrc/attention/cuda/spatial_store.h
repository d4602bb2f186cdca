// The end of a forward over a map: from accumulators and softmax statistics to the results in memory.
#pragma once

#include "attention/cuda/forward_store.h"
#include "attention/cuda/spatial_tile.h"

namespace vitkernels::cuda {

// The results of a block, whose rows are `tokens`. They leave through the shared memory of the queries, `sO`.
template <int kThreads, class Mma, class Out, class Softmax, class Shared>
__device__ void store_map(const SpatialCudaParams& p, const SpatialTask& task, const int* tokens, const Mma& mma,
                          Out& out, const Softmax& softmax, Shared& sO) {
  using Element = typename Shared::value_type;
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor cO = by_rows(thread.partition_C(cute::make_identity_tensor(cute::product_each(shape(sO)))));
  cute::Tensor out_rows = by_rows(out);  // both (rows,columns)
  const int64_t first = task.batch * p.num_queries();
  finish_rows(out_rows, cO, softmax, [&](int row, float max, float sum) {
    if (tokens[row] >= 0) p.lse[(first + tokens[row]) * p.heads + task.head] = Softmax::lse_of(max, sum);
  });
  __syncthreads();  // all reads of the queries are done
  cute::copy(cute::AutoVectorizingCopy{}, convert<Element>(out), thread.partition_C(sO));
  __syncthreads();
  Element* const target = static_cast<Element*>(p.out) + (first * p.heads + task.head) * p.value_dim;
  store_rows<kThreads>(sO, tokens, target, p.heads * p.value_dim, int(p.value_dim));
}

}  // namespace vitkernels::cuda
