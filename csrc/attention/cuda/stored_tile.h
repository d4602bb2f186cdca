// A tile of the logits' gradient, for the gradients of the score terms, as the fast path's main pass has stored it
// (LogitGrads). The interface is that of GradientTile (gradient_tile.h), which recomputes it.
#pragma once

#include "attention/cuda/gradient_tile.h"

namespace vitkernels::cuda {

// A thread has eight queries of a key.
template <class T>
struct StoredTile {
  using Element = T;
  static constexpr int kQueries = LogitGrads::kQueries, kKeys = 32, kThreads = 128;
  using FloatLayout = cute::Layout<cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>,
                                   cute::Stride<cute::Int<kKeys + 4>, cute::_1>>;  // (queries,keys)
  static constexpr int kSharedBytes = kQueries * (kKeys + 4) * sizeof(float);

  const AttentionBackwardCudaParams& p;
  Element* shared;

  static __device__ bool find(const AttentionBackwardCudaParams& p, int64_t batch, int64_t head, int64_t query_tile,
                              int64_t key_tile, TileTask& task) {
    const Problem& problem = p.forward.problem;
    task.tile = {batch, head, tile_of(query_tile, kQueries, problem.num_queries()),
                 tile_of(key_tile, kKeys, problem.num_keys())};
    return true;
  }

  __device__ auto accumulator() const {
    return cute::make_tensor<float>(cute::Layout<cute::Shape<cute::_2, cute::_4>>{});  // (2,queries/8)
  }

  // Zero past the last key, and past the last query, where the main pass has stored zeros.
  __device__ auto gradient(const TileTask& task, TermFactor) const {
    cute::Tensor grads = accumulator();  // (2,queries/8)
    clear(grads);
    const LogitTile& tile = task.tile;
    const int key = int(tile.keys.begin) + int(threadIdx.x) / 4;
    if (key >= tile.keys.end) return grads;
    using Stored = cutlass::AlignedArray<Element, LogitGrads::kLaneQueries>;
    const int index =
        QueryStatistics::index(p.forward.problem, int(tile.batch), int(tile.head), int(tile.queries.begin));
    const Element* const row = p.logit_grads.row<const Element>(p.forward.problem, index, key);
    const Stored stored = *reinterpret_cast<const Stored*>(row + threadIdx.x % 4 * LogitGrads::kLaneQueries);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) = float(stored[i]);
    return grads;
  }

  // To shared memory, for all threads to read.
  template <class Grads>
  __device__ auto share(const Grads& grads) const {
    cute::Tensor shared_grads =
        cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<float*>(shared)), FloatLayout{});  // (queries,keys)
    __syncthreads();  // all reads of the previous tile are done
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {
      CUTE_UNROLL
      for (int j = 0; j < 2; ++j) shared_grads(n * 8 + threadIdx.x % 4 * 2 + j, threadIdx.x / 4) = grads(j, n);
    }
    __syncthreads();
    return shared_grads;
  }
};

// Calls f.template operator()<Tile>() with the tile of dS that a launch reads.
template <class Function>
auto dispatch_tile(const AttentionBackwardCudaParams& p, Function&& f) {
  return dispatch_element(p.forward.problem.dtype, [&]<class Element>(Element) {
    if constexpr (sizeof(Element) == 2) {
      if (p.logit_grads.data) return f.template operator()<StoredTile<Element>>();
    }
    return f.template operator()<GradientTile<Element, DenseKeys>>();
  });
}

}  // namespace vitkernels::cuda
