// A tile of the logits' gradient, recomputed for the gradients of the score terms. Only S and dP are needed, so the
// depth passes through shared memory in chunks, and all head dimensions share one kernel.
#pragma once

#include "attention/cuda/differentiate.h"

namespace vitkernels::cuda {

struct TileTask {
  LogitTile tile;
  int64_t kv_head;
  Sequence sequence;
};

template <class T, class Keys>
struct GradientTile {
  using Element = T;
  static constexpr int kQueries = 64, kKeys = 32, kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kDepth = 128 / sizeof(Element);  // columns of a chunk
  static constexpr int kChunk = (kQueries + kKeys) * kDepth;
  static constexpr int kSharedBytes = 2 * kChunk * sizeof(Element);  // the copy of the next overlaps the product of one

  using SharedQueries = SharedTile<Element, kQueries, kDepth>;
  using SharedKeys = SharedTile<Element, kKeys, kDepth>;
  using Copy = typename TileCopy<Element, kThreads, kDepth>::Copy;
  using Mma = TileMma<Element, kWarps>;

  // In shared memory as float32; the padding avoids bank conflicts between rows.
  using FloatLayout = cute::Layout<cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>,
                                   cute::Stride<cute::Int<kKeys + 8>, cute::_1>>;  // (queries,keys)
  static constexpr int kFloatBytes = kQueries * (kKeys + 8) * sizeof(float);
  static_assert(kFloatBytes <= kSharedBytes, "the gradient reuses the memory of the chunks");

  const AttentionBackwardCudaParams& p;
  Element* shared;
  Mma mma{p.forward.allow_tf32};

  // False where no query of the tile sees a key of it.
  static __device__ bool find(const AttentionBackwardCudaParams& p, int64_t batch, int64_t head, int64_t query_tile,
                              int64_t key_tile, TileTask& task) {
    const Sequence sequence = p.forward.sequence(batch);
    const Range queries = tile_of(query_tile, kQueries, sequence.axis.num_queries);
    const Keys seen = Keys::of(sequence);
    const Range keys = seen.rows(key_tile, kKeys);
    task = {.tile = {batch, head, queries, keys}, .kv_head = p.forward.kv_head(head), .sequence = sequence};
    return task.kv_head >= 0 && !queries.empty() && seen.is_visible(queries, keys);
  }

  __device__ auto coordinates() const {
    return coordinates_of<Side::kQueries, kQueries, kKeys>(mma);
  }  // (queries,keys)
  __device__ auto accumulator() const {
    return cute::partition_fragment_C(mma, cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
  }

  // Zero where a query does not see a key.
  __device__ auto gradient(const TileTask& task, TermFactor factor) const {
    cute::Tensor probs = accumulator();  // (MMA,MMA_M,MMA_N)
    cute::Tensor grads = accumulator();  // (MMA,MMA_M,MMA_N)
    multiply(task, probs, grads);
    cute::Tensor products = cute::make_fragment_like(probs);  // (MMA,MMA_M,MMA_N)
    cute::copy(probs, products);

    const auto at = coordinates();                     // (queries,keys)
    cute::Tensor logits = by_rows(probs);              // (queries,keys)
    cute::Tensor logit_grads = by_rows(grads);         // (queries,keys)
    cute::Tensor scaled_products = by_rows(products);  // (queries,keys)
    const Score& score = p.forward.problem.score;
    apply_score<kKeys>(logits, at, score, Keys::of(task.sequence), task.tile);
    differentiate<true>(logits, logit_grads, at, p, task.sequence, task.tile);
    if (factor == TermFactor::kBias) return grads;
    const float scale = score.scale_of<float>(task.tile.head);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) *= products(i) * scale;
    if (factor == TermFactor::kMultiplierTable) {
      combine_term(logit_grads, at, score.multiplier, task.tile, Times{});
    } else {
      combine_table(logit_grads, at, score.by_offset.small, score.by_offset.multiplier, task.tile, Times{});
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
    __syncthreads();                             // all reads of the chunks are done
    cute::copy(grads, mma.get_slice(threadIdx.x).partition_C(shared_grads));
    __syncthreads();
    return shared_grads;
  }

 private:
  // products = queries keys^T, grads = the product of both sides' values.
  template <class Products, class Grads>
  __device__ void multiply(const TileTask& task, Products& products, Grads& grads) const {
    const Problem& problem = p.forward.problem;
    const LogitTile& tile = task.tile;
    const int chunks_of_products = ceil_div(int(problem.head_dim), kDepth);
    const int chunks = chunks_of_products + ceil_div(int(problem.value_dim), kDepth);
    const auto queries = [&](int i) {
      return cute::make_tensor(cute::make_smem_ptr(shared + i % 2 * kChunk), typename SharedQueries::Layout{});
    };
    const auto keys = [&](int i) {
      return cute::make_tensor(cute::make_smem_ptr(shared + i % 2 * kChunk + int{SharedQueries::kElements}),
                               typename SharedKeys::Layout{});
    };
    const auto depth = [&](int i) {
      return i < chunks_of_products ? int(problem.head_dim) - i * kDepth
                                    : int(problem.value_dim) - (i - chunks_of_products) * kDepth;
    };
    const int64_t value_head = p.key_value_has_query_heads ? tile.head : task.kv_head;
    const auto start = [&](int i) {
      const bool is_product = i < chunks_of_products;
      const int first = (is_product ? i : i - chunks_of_products) * kDepth, columns = min(depth(i), kDepth);
      start_tile<Copy>(queries(i), is_product ? problem.query : p.query_value, tile.batch, tile.head,
                       task.sequence.query_tokens(tile.queries), first, columns);
      start_tile<Copy>(keys(i), is_product ? problem.key : p.key_value, tile.batch,
                       is_product ? task.kv_head : value_head, task.sequence.key_tokens(tile.keys), first, columns);
      commit_copies();
    };
    clear(products);
    clear(grads);
    __syncthreads();  // all reads of the previous tile are done
    start(0);
    for (int i = 0; i < chunks; ++i) {
      wait_for_copies<0>();
      __syncthreads();  // this chunk has arrived, and all reads of the other one are done
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
