// The forward's fast path where all keys of a head fit into shared memory: images of 224 pixels in patches of 16.
//
// A thread block loads the keys and values of one head once. Its warps take sixteen queries at a time, each on its own:
// the logits of a row are in registers together, so that there is one pass, one maximum and no correction, and warps
// meet at no barrier once the values are there.

#include "attention/cuda/forward_store.h"
#include "attention/cuda/launches.h"
#include "attention/cuda/plain_score.h"
#include "attention/cuda/plain_tasks.h"
#include "attention/cuda/tile_sizes.h"
#include "attention/cuda/tokens.h"
#include "cuda/fast_softmax.h"
#include "cuda/mma.h"
#include "cuda/tile_stream.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class Element, int kDim, bool kHasBias>
struct ResidentForwardKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kMinBlocks = 2;
  static constexpr int kQueries = kResidentQueries, kKeys = kMaxResidentKeys;
  static constexpr int kChunk = 16, kChunks = kKeys / kChunk;  // keys of a step

  using SharedKeys = SharedTile<Element, kKeys, kDim>;
  using SharedQueries = SharedTile<Element, kQueries, kDim>;
  static constexpr int kRowsOfCopy = std::max(kChunk, kThreads* TileCopy<Element, kThreads, kDim>::kVector / kDim);
  using SharedRows = SharedTile<Element, kRowsOfCopy, kDim>;
  using Rows = TileStream<Element, kThreads, kRowsOfCopy, kDim>;
  using Queries = TileStream<Element, kWarpSize, kQueries, kDim>;
  using Mma = TileMma<Element, 1>;
  using Chunk = decltype(partition_fragment_C(Mma(false), Shape<Int<kQueries>, Int<kChunk>>{}));  // (MMA,MMA_M,MMA_N)
  // Keys, values, and for each warp its queries and its results.
  static constexpr int kSharedBytes =
      (2 * SharedKeys::kElements + 2 * kWarps * SharedQueries::kElements) * int(sizeof(Element));

  // Chunks that are skipped together, since a branch for each would cost more than it saves: the first twelve in groups,
  // the others one by one.
  static constexpr int kGroup = kHasBias ? 2 : 4;  // registers do not suffice for the bias of four
  static constexpr int kGroupedChunks = 12, kGroups = kGroupedChunks / kGroup + kChunks - kGroupedChunks;

  static constexpr int first_chunk(int group) {
    return group * kGroup < kGroupedChunks ? group * kGroup : kGroupedChunks + group - kGroupedChunks / kGroup;
  }

  // Calls f(first chunk, end), constants, for the groups of which a key exists.
  template <int kIndex = 0, class Function>
  static __device__ __forceinline__ void for_each_group(int num_keys, Function&& f) {
    if constexpr (kIndex < kGroups) {
      if (first_chunk(kIndex) * kChunk >= num_keys) return;
      f(Int<first_chunk(kIndex)>{}, Int<first_chunk(kIndex + 1)>{});
      for_each_group<kIndex + 1>(num_keys, f);
    }
  }

  // All rows of groups that exist; those past the keys become zero.
  static __device__ void start_rows(Element* shared, const TokenTensor& t, int batch, int head, int num_keys,
                                    int64_t columns) {
    const bool is_grouped = num_keys <= kGroupedChunks * kChunk;
    const int padded = is_grouped ? ceil_div(num_keys, kGroup * kChunk) * kGroup * kChunk : num_keys;
    int tile = (padded - 1) / kRowsOfCopy;
    Rows rows(t.at<const Element>(batch, tile * kRowsOfCopy, head), t.token_stride, int(columns));
    for (; tile >= 0; --tile) {
      Tensor sT = make_tensor(make_smem_ptr(shared + tile * int{SharedRows::kElements}),
                              typename SharedRows::Layout{});  // (rows,dim)
      rows.start_some(sT, num_keys - tile * kRowsOfCopy);
    }
    commit_copies();
  }

  static __device__ __forceinline__ void run(const AttentionCudaParams& p, const PlainTasks& tasks, Element* shared) {
    const Problem& problem = p.problem;
    const PlainTask task = tasks.task(int(blockIdx.x));
    const int num_keys = int(problem.num_keys()), num_queries = int(problem.num_queries());
    const int warp = int(threadIdx.x) / kWarpSize, lane = lane_index();
    Element* const shared_values = shared + int{SharedKeys::kElements};
    Element* const shared_queries =
        shared_values + int{SharedKeys::kElements} + 2 * warp * int{SharedQueries::kElements};
    Tensor sK = make_tensor(make_smem_ptr(shared), typename SharedKeys::Layout{});             // (keys,dim)
    Tensor sV = make_tensor(make_smem_ptr(shared_values), typename SharedKeys::Layout{});      // (keys,dim)
    Tensor sQ = make_tensor(make_smem_ptr(shared_queries), typename SharedQueries::Layout{});  // (queries,dim)
    Tensor sO =
        make_tensor(sQ.data() + int{SharedQueries::kElements}, typename SharedQueries::Layout{});  // (queries,dim)

    // This block's share of the query tiles.
    const int num_tiles = ceil_div(num_queries, kQueries);
    int tile = num_tiles * task.tile / tasks.num_tiles + warp;
    const int end_tile = num_tiles * (task.tile + 1) / tasks.num_tiles;
    const auto start_queries = [&](int of_tile) {
      if (of_tile < end_tile) {
        Queries(problem.query.at<const Element>(task.batch, of_tile * kQueries, task.head), problem.query.token_stride,
                int(problem.head_dim))
            .start_some(sQ, num_queries - of_tile * kQueries);
      }
      commit_copies();
    };
    start_queries(tile);
    start_rows(shared, problem.key, task.batch, task.kv_head, num_keys, problem.head_dim);
    start_rows(shared_values, problem.value, task.batch, task.kv_head, num_keys, problem.value_dim);

    const Mma mma(false);
    const auto thread = mma.get_slice(lane);
    const typename Mma::CopyA copy_a;
    const typename Mma::CopyB copy_b;
    const typename Mma::CopyTransposedB copy_v;
    const auto thread_a = make_tiled_copy_A(copy_a, mma).get_slice(lane);
    const auto thread_b = make_tiled_copy_B(copy_b, mma).get_slice(lane);
    const auto thread_v = make_tiled_copy_B(copy_v, mma).get_slice(lane);
    const auto sVt = transposed(sV);                                            // (dim,keys)
    Tensor rQ = make_fragment_like<Element>(thread.partition_fragment_A(sQ));   // (MMA,MMA_M,MMA_K)
    Tensor rK = make_fragment_like<Element>(thread.partition_fragment_B(sK));   // (MMA,MMA_N,MMA_K)
    Tensor rV = make_fragment_like<Element>(thread.partition_fragment_B(sVt));  // (MMA,MMA_N,MMA_K)
    Tensor tQs = thread_a.partition_S(sQ);                                      // (CPY,CPY_M,CPY_K)
    Tensor tKs = thread_b.partition_S(sK);                                      // (CPY,CPY_N,CPY_K)
    Tensor tVs = thread_v.partition_S(sVt);                                     // (CPY,CPY_N,CPY_K)
    Tensor tQr = thread_a.retile_D(rQ);                                         // (CPY,CPY_M,CPY_K)
    Tensor tKr = thread_b.retile_D(rK);                                         // (CPY,CPY_N,CPY_K)
    Tensor tVr = thread_v.retile_D(rV);                                         // (CPY,CPY_N,CPY_K)
    const auto coordinates =
        by_rows(thread.partition_C(make_identity_tensor(Shape<Int<kQueries>, Int<kChunk>>{})));  // (rows,columns)
    const float scale = problem.score.scale_of<float>(task.head);
    const float unit = kHasBias ? kLog2e : scale * kLog2e;
    wait_for_copies<1>();
    __syncthreads();  // the keys and the first queries have arrived
    bool is_first = true;
    // Logits, or without a bias the products, which are scaled with the exponential. Declared here, since CuTe clears
    // tensors that it creates.
    Chunk logits[kChunks];  // (MMA,MMA_M,MMA_N)
    for (; tile < end_tile; tile += kWarps) {
      const int rows = min(num_queries - tile * kQueries, kQueries);
      if (!is_first) {
        wait_for_copies<0>();
        __syncwarp();
      }
      cute::copy(copy_a, tQs, tQr);
      __syncwarp();  // all reads of the queries are done
      start_queries(tile + kWarps);

      const ScoreTerm& term = problem.score.bias;
      BiasRows<2, kChunk, decltype(coordinates)> bias(
          static_cast<const float*>(term.data) + term.strides.offset(task.batch, task.head, tile * kQueries, 0),
          int(term.strides.query), rows, coordinates);
      float max[2] = {-std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}, sum[2] = {};
      for_each_group(num_keys, [&](auto first, auto end) __attribute__((always_inline)) {
        CUTE_UNROLL
        for (int chunk = first; chunk < end; ++chunk) clear(logits[chunk]);
        // The depth outside, so that neighbouring instructions do not wait for each other.
        CUTE_UNROLL
        for (int k = 0; k < size<2>(rQ); ++k) {
          CUTE_UNROLL
          for (int chunk = first; chunk < end; ++chunk) {
            cute::copy(copy_b, tKs(_, chunk, k), tKr(_, chunk, k));
            gemm(mma, rQ(_, 0, k), rK(_, 2 * chunk, k), logits[chunk](_, 0, 0));
            gemm(mma, rQ(_, 0, k), rK(_, 2 * chunk + 1, k), logits[chunk](_, 0, 1));
          }
        }
        CUTE_UNROLL
        for (int chunk = first; chunk < end; ++chunk) {
          const int keys = num_keys - chunk * kChunk;
          Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
          if (keys >= kChunk) {
            if constexpr (kHasBias) bias.template add<true>(numbers, scale);
          } else {
            if constexpr (kHasBias) bias.add_some(numbers, scale, keys);
            mask_tail(numbers, coordinates, keys);
          }
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            CUTE_UNROLL
            for (int c = 0; c < size<1>(numbers); ++c) max[r] = fmaxf(max[r], numbers(r, c));
          }
        }
      });
      float offset[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        max[r] = combine_quad(max[r], [](float a, float b) { return fmaxf(a, b); });
        offset[r] = max[r] * unit;
      }
      // As in FastOnlineSoftmax.
      if (__any_sync(kAllLanes, !(fmaxf(fabsf(offset[0]), fabsf(offset[1])) <= kMaxExpOffset))) {
        rarely();
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          offset[r] = 0.0f;
          const float reference = max[r] == -std::numeric_limits<float>::infinity() ? 0.0f : max[r];
          CUTE_UNROLL
          for (int chunk = 0; chunk < kChunks; ++chunk) {
            Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
            CUTE_UNROLL
            for (int c = 0; c < size<1>(numbers); ++c) numbers(r, c) -= reference;
          }
        }
      }
      if (is_first) {
        wait_for_copies<1>();
        __syncthreads();  // the values have arrived
        is_first = false;
      }

      Tensor out = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
      clear(out);
      for_each_group(num_keys, [&](auto first, auto end) __attribute__((always_inline)) {
        CUTE_UNROLL
        for (int chunk = first; chunk < end; ++chunk) {
          cute::copy(copy_v, tVs(_, _, chunk), tVr(_, _, chunk));
          Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            CUTE_UNROLL
            for (int c = 0; c < size<1>(numbers); ++c) {
              numbers(r, c) = exp2_of(fmaf(numbers(r, c), unit, -offset[r]));
              sum[r] += numbers(r, c);
            }
          }
          const auto probs = as_operand_a(convert<Element>(logits[chunk]));  // (MMA,MMA_M,MMA_K)
          gemm(mma, probs(_, _, 0), rV(_, _, chunk), out);
        }
      });
      store(p, task, tile * kQueries, rows, mma, out, max, sum, kHasBias ? 1.0f : scale, sO);
    }
    if (is_first) {  // a warp without queries
      wait_for_copies<0>();
      __syncthreads();
    }
  }

  // out / sum, and the LSE. Results leave through the warp's shared memory.
  template <class Out, class Shared>
  static __device__ void store(const AttentionCudaParams& p, const PlainTask& task, int first_query, int rows,
                               const Mma& mma, Out& out, const float (&max)[2], const float (&sums)[2], float scale,
                               Shared& sO) {
    const auto thread = mma.get_slice(lane_index());
    Tensor out_rows = by_rows(out);                                                              // (rows,columns)
    const auto at = by_rows(thread.partition_C(make_identity_tensor(product_each(shape(sO)))));  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = combine_quad(sums[r], [](float a, float b) { return a + b; });
      const float factor = __fdividef(1.0f, sum);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) = sum == 0.0f ? 0.0f : out_rows(r, c) * factor;
      const int row = get<0>(at(r, 0));
      if (get<1>(at(r, 0)) == 0 && row < rows) {
        const int64_t query = task.batch * p.problem.num_queries() + first_query + row;
        p.lse[query * p.problem.heads + task.head] = lse_of(max[r] * scale, sum);
      }
    }
    __syncwarp();  // all reads of the previous results are done
    cute::copy(AutoVectorizingCopy{}, convert<Element>(out), thread.partition_C(sO));
    __syncwarp();
    copy_rows_to_global<kWarpSize>(sO, p.out.at<Element>(task.batch, first_query, task.head), p.out.token_stride, rows,
                                   int(p.problem.value_dim), p.out.is_aligned);
  }
};

template <class Element, int kDim, bool kHasBias>
__global__ void __launch_bounds__(ResidentForwardKernel<Element, kDim, kHasBias>::kThreads,
                                  ResidentForwardKernel<Element, kDim, kHasBias>::kMinBlocks)
    attention_resident(const __grid_constant__ AttentionCudaParams p, const __grid_constant__ PlainTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  ResidentForwardKernel<Element, kDim, kHasBias>::run(p, tasks, reinterpret_cast<Element*>(shared));
}

// Blocks of a head: where there are few heads, its queries are shared, four query tiles a block at least.
int64_t blocks_of_head(const Problem& problem) {
  const int64_t tiles = ceil_div<int64_t>(problem.num_queries(), kResidentQueries);
  const int64_t wanted = ceil_div<int64_t>(kBlocksOfLargeGpu, problem.heads * problem.batch);
  return std::max<int64_t>(1, std::min(wanted, tiles / 4));
}

template <class Element, int kDim, bool kHasBias>
cudaError_t launch(const AttentionCudaParams& p, cudaStream_t stream) {
  using Kernel = ResidentForwardKernel<Element, kDim, kHasBias>;
  const Problem& problem = p.problem;
  const int64_t of_head = blocks_of_head(problem);
  return launch_tasks(attention_resident<Element, kDim, kHasBias>, of_head * problem.heads * problem.batch,
                      Kernel::kThreads, Kernel::kSharedBytes, stream, p, plain_tasks(problem, of_head));
}

template <class Element, int kDim>
cudaError_t launch(const AttentionCudaParams& p, cudaStream_t stream) {
  return p.problem.score.bias.data ? launch<Element, kDim, true>(p, stream) : launch<Element, kDim, false>(p, stream);
}

}  // namespace

template <DType kDType>
cudaError_t ResidentForwardLaunches<kDType>::forward(const AttentionCudaParams& p, cudaStream_t stream) {
  if (blocks_of_head(p.problem) * p.problem.heads * p.problem.batch > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const bool is_narrow = std::max(p.problem.head_dim, p.problem.value_dim) <= 32;
  return is_narrow ? launch<ElementOf<kDType>, 32>(p, stream) : launch<ElementOf<kDType>, 64>(p, stream);
}

template cudaError_t ResidentForwardLaunches<DType::VK_DTYPE>::forward(const AttentionCudaParams&, cudaStream_t);

}  // namespace vitkernels
