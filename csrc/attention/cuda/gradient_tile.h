// A tile of the logits' gradient, computed again for the gradients of the score terms. Only S and dP are needed, so the
// depth passes through shared memory in chunks, and head dimensions of any size share one kernel.
#pragma once

#include "attention/cuda/differentiate.h"

namespace vitkernels::cuda {

// Queries of a head that meet keys.
struct TileTask {
  int64_t batch, head, kv_head;
  Sequence sequence;
  Range rows, keys;
};

template <class Element>
struct GradientTile {
  static constexpr int kQueries = 64, kKeys = 32, kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kDepth = 128 / sizeof(Element);  // columns of a chunk
  static constexpr int kChunk = (kQueries + kKeys) * kDepth;
  static constexpr int kSharedBytes = 2 * kChunk * sizeof(Element);  // while one is multiplied, the next arrives

  using Queries = SharedTile<Element, kQueries, kDepth>;
  using Keys = SharedTile<Element, kKeys, kDepth>;
  using Copy = typename TileCopy<Element, kThreads, kDepth>::Copy;
  using Mma = TileMma<Element, kWarps>;

  // In shared memory as float32; the padding keeps rows apart in the banks.
  using FloatLayout = cute::Layout<cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>,
                                   cute::Stride<cute::Int<kKeys + 8>, cute::_1>>;  // (queries,keys)
  static constexpr int kFloatBytes = kQueries * (kKeys + 8) * sizeof(float);
  static_assert(kFloatBytes <= kSharedBytes, "the gradient takes the place of the chunks");

  const AttentionBackwardCudaParams& p;
  Element* shared;
  Mma mma{p.allow_tf32};

  // False where no query of the tile sees a key of it.
  static __device__ bool find(const AttentionBackwardCudaParams& p, int64_t batch, int64_t head, int64_t query_tile,
                              int64_t key_tile, TileTask& task) {
    const Sequence sequence = p.sequence(batch);
    task = {.batch = batch,
            .head = head,
            .kv_head = p.kv_head(head),
            .sequence = sequence,
            .rows = tile_of(query_tile, kQueries, sequence.axis.num_queries),
            .keys = tile_of(key_tile, kKeys, sequence.axis.num_keys)};
    return task.kv_head >= 0 && !task.rows.empty() && !intersect(sequence.axis.any_keys(task.rows), task.keys).empty();
  }

  __device__ auto coordinates() const {
    return coordinates_of<Side::kQueries, kQueries, kKeys>(mma);
  }  // (queries,keys)
  __device__ auto sums() const {
    return cute::partition_fragment_C(mma, cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
  }

  // Zero where a query does not see a key.
  __device__ auto gradient(const TileTask& task, TermFactor factor) const {
    cute::Tensor probs = sums();  // (MMA,MMA_M,MMA_N)
    cute::Tensor grads = sums();  // (MMA,MMA_M,MMA_N)
    multiply(task, probs, grads);
    cute::Tensor products = cute::make_fragment_like(probs);  // (MMA,MMA_M,MMA_N)
    cute::copy(probs, products);

    const auto at = coordinates();                     // (queries,keys)
    cute::Tensor logits = by_rows(probs);              // (queries,keys)
    cute::Tensor logit_grads = by_rows(grads);         // (queries,keys)
    cute::Tensor scaled_products = by_rows(products);  // (queries,keys)
    const TilePairs pairs{task.batch, task.head, task.rows, task.keys};
    apply_score<kKeys>(logits, at, p.score, task.sequence.axis, task.batch, task.head, task.rows, task.keys);
    differentiate<true>(logits, logit_grads, at, p, task.sequence, task.batch, task.head, task.rows);
    if (factor == TermFactor::kBias) return grads;
    const float scale = p.score.scale_of<float>(task.head);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) *= products(i) * scale;
    if (factor == TermFactor::kMultiplierTable) {
      combine_term(logit_grads, at, p.score.multiplier, pairs, Times{});
    } else {
      combine_table(logit_grads, at, p.score.on_grid.small, p.score.on_grid.multiplier, pairs, Times{});
    }
    return grads;
  }

  static __device__ auto floats(Element* data) {
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<float*>(data)), FloatLayout{});  // (queries,keys)
  }

  // To shared memory, for all threads to read.
  template <class Grads>
  __device__ auto share(const Grads& grads) const {
    cute::Tensor shared_grads = floats(shared);  // (queries,keys)
    __syncthreads();                             // nobody reads the chunks any more
    cute::copy(grads, mma.get_slice(threadIdx.x).partition_C(shared_grads));
    __syncthreads();
    return shared_grads;
  }

 private:
  // products = the queries' with the keys, grads = the product of both sides' values.
  template <class Products, class Grads>
  __device__ void multiply(const TileTask& task, Products& products, Grads& grads) const {
    const int chunks_of_products = ceil_div(int(p.head_dim), kDepth);
    const int chunks = chunks_of_products + ceil_div(int(p.value_dim), kDepth);
    const auto queries = [&](int i) {
      return cute::make_tensor(cute::make_smem_ptr(shared + i % 2 * kChunk), typename Queries::Layout{});
    };
    const auto keys = [&](int i) {
      return cute::make_tensor(cute::make_smem_ptr(shared + i % 2 * kChunk + int{Queries::kElements}),
                               typename Keys::Layout{});
    };
    const auto depth = [&](int i) {
      return i < chunks_of_products ? int(p.head_dim) - i * kDepth
                                    : int(p.value_dim) - (i - chunks_of_products) * kDepth;
    };
    const int64_t value_head = p.key_value_has_query_heads ? task.head : task.kv_head;
    const auto start = [&](int i) {
      const bool is_product = i < chunks_of_products;
      const int first = (is_product ? i : i - chunks_of_products) * kDepth, columns = min(depth(i), kDepth);
      start_tile<Copy>(queries(i), is_product ? p.query : p.query_value, task.batch, task.head,
                       task.sequence.query_tokens(task.rows), first, columns);
      start_tile<Copy>(keys(i), is_product ? p.key : p.key_value, task.batch, is_product ? task.kv_head : value_head,
                       task.sequence.key_tokens(task.keys), first, columns);
      commit_copies();
    };
    clear(products);
    clear(grads);
    __syncthreads();  // nobody reads the last tile any more
    start(0);
    for (int i = 0; i < chunks; ++i) {
      wait_for_copies<0>();
      __syncthreads();  // this chunk is there, and nobody reads the other one any more
      if (i + 1 < chunks) start(i + 1);
      if (i < chunks_of_products) {
        multiply_tile(mma, products, queries(i), keys(i), depth(i));
      } else {
        multiply_tile(mma, grads, queries(i), keys(i), depth(i));
      }
    }
  }
};

}  // namespace vitkernels::cuda
