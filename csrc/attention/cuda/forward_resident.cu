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
  // Rows of 128 bytes that are an odd number of vectors apart are free of bank conflicts at constant offsets, without a
  // swizzle. Shorter ones are not: a read of eight vectors meets two of them.
  using PaddedRows = Layout<Shape<Int<kQueries>, Int<kDim>>, Stride<Int<kDim + 16 / sizeof(Element)>, _1>>;
  using SharedResults =
      std::conditional_t<kDim * sizeof(Element) == 128, PaddedRows, typename SharedQueries::Layout>;  // (queries,dim)
  static constexpr int kResultElements = decltype(cosize(SharedResults{}))::value;
  static constexpr int kRowsOfCopy = std::max(kChunk, kThreads* TileCopy<Element, kThreads, kDim>::kVector / kDim);
  using SharedRows = SharedTile<Element, kRowsOfCopy, kDim>;
  using Rows = TileStream<Element, kThreads, kRowsOfCopy, kDim>;
  using Queries = TileStream<Element, kWarpSize, kQueries, kDim>;
  using Results = ResultStream<Element, kQueries, kDim>;
  using Mma = TileMma<Element, 1>;
  using Chunk = decltype(partition_fragment_C(Mma(false), Shape<Int<kQueries>, Int<kChunk>>{}));  // (MMA,MMA_M,MMA_N)
  using Softmax = FastSoftmax<2>;
  // Keys, values, and for each warp its queries and its results.
  static constexpr int kWarpElements = SharedQueries::kElements + ceil_div(kResultElements, 64) * 64;
  static constexpr int kSharedBytes = (2 * SharedKeys::kElements + kWarps * kWarpElements) * int(sizeof(Element));

  // Chunks that are skipped together, since a branch for each would cost more than it saves: the first twelve in
  // groups, the others one by one.
  static constexpr int kGroup = kHasBias ? 2 : 4;  // registers do not suffice for the bias of four
  static constexpr int kGroupedChunks = 12, kGroups = kGroupedChunks / kGroup + kChunks - kGroupedChunks;

  static constexpr int first_chunk(int group) {
    return group * kGroup < kGroupedChunks ? group * kGroup : kGroupedChunks + group - kGroupedChunks / kGroup;
  }

  // Calls f(first chunk, end), constants, for the groups of which a key exists.
  template <int kIndex = 0, class Function>
  static __device__ __forceinline__ void for_each_group(int num_keys, Function&& f) {
    if constexpr (kIndex < kGroups) {
      if (kIndex > 0 && first_chunk(kIndex) * kChunk >= num_keys) return;
      f(Int<first_chunk(kIndex)>{}, Int<first_chunk(kIndex + 1)>{});
      for_each_group<kIndex + 1>(num_keys, f);
    }
  }

  static __device__ __forceinline__ void run(const AttentionCudaParams& p, const PlainTasks& tasks, Element* shared) {
    const Problem& problem = p.problem;
    const PlainTask task = tasks.task(int(blockIdx.x));
    const int num_keys = int(problem.num_keys()), warp = int(threadIdx.x) / kWarpSize;
    Element* const shared_values = shared + int{SharedKeys::kElements};
    Element* const shared_queries = shared_values + int{SharedKeys::kElements} + warp * kWarpElements;
    Element* const shared_results = shared_queries + int{SharedQueries::kElements};
    Tensor sK = shared_tile<SharedKeys>(shared);                              // (keys,dim)
    Tensor sV = shared_tile<SharedKeys>(shared_values);                       // (keys,dim)
    Tensor sQ = shared_tile<SharedQueries>(shared_queries);                   // (queries,dim)
    Tensor sO = make_tensor(make_smem_ptr(shared_results), SharedResults{});  // (queries,dim)

    // The tiles of a warp go from the last to the first, so that all but the first that it takes are whole. Pointers
    // run.
    const auto [first_tile, num_tiles] = share_of(task.tile * kWarps + warp, tasks.num_tiles * kWarps, problem);
    const int last_query = (first_tile + num_tiles - 1) * kQueries, heads = int(problem.heads);
    int rows = min(int(problem.num_queries()) - last_query, kQueries);
    Queries queries(problem.query.at<const Element>(task.batch, last_query, task.head), problem.query.token_stride,
                    int(problem.head_dim));
    Results results(p.out.at<Element>(task.batch, last_query, task.head), p.out.token_stride, int(problem.value_dim));
    float* lse = p.lse + (task.batch * problem.num_queries() + last_query) * problem.heads + task.head;
    const ScoreTerm& term = problem.score.bias;
    const float* bias_rows =
        static_cast<const float*>(term.data) + term.strides.offset(task.batch, task.head, last_query, 0);
    queries.start_some(sQ, rows);
    start_rows(shared, problem.key, task.batch, task.kv_head, num_keys, problem.head_dim);
    commit_copies();
    start_rows(shared_values, problem.value, task.batch, task.kv_head, num_keys, problem.value_dim);
    commit_copies();

    const Mma mma(false);
    const auto coordinates = coordinates_of<kChunk>(mma);
    const float scale = problem.score.scale_of<float>(task.head);
    bool is_first = true;
    // Logits, or without a bias the products, which are scaled with the exponential. Declared here, since CuTe clears
    // tensors that it creates.
    Chunk logits[kChunks];  // (MMA,MMA_M,MMA_N)
    wait_for_copies<1>();
    __syncthreads();  // the keys and the first queries have arrived
    for (int left = num_tiles; left > 0; --left) {
      const auto rQ = read_operand_a(mma, sQ, lane_index());  // (MMA,MMA_M,MMA_K)
      __syncwarp();                                           // all reads of the queries are done
      if (left > 1) queries.start_whole(sQ);
      commit_copies();

      Softmax softmax(kHasBias ? kLog2e : scale * kLog2e);
      BiasRows<2, kChunk, decltype(coordinates)> bias(bias_rows, int(term.strides.query), rows, coordinates);
      bias_rows -= int64_t(kQueries) * int(term.strides.query);
      for_each_group(num_keys, [&](auto first, auto end) __attribute__((always_inline)) {
        multiply_keys<first, end>(mma, logits, rQ, sK);
        finish_logits<first, end>(logits, bias, scale, coordinates, num_keys);
        CUTE_UNROLL
        for (int chunk = first; chunk < end; ++chunk) Softmax::raise(softmax.max, by_rows(logits[chunk]));
      });
      Softmax::combine(softmax.max);
      softmax.find_offsets([&](int r, float x) __attribute__((always_inline)) { subtract(logits, r, x); });
      if (is_first) {
        wait_for_copies<1>();
        __syncthreads();  // the values have arrived
        is_first = false;
      }

      Tensor out = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
      clear(out);
      for_each_group(num_keys, [&](auto first, auto end) __attribute__((always_inline)) {
        CUTE_UNROLL
        for (int chunk = first; chunk < end; ++chunk) multiply_values(mma, out, softmax, logits[chunk], sV, chunk);
      });

      softmax.total(kHasBias ? 1.0f : scale);
      Tensor out_rows = by_rows(out);  // (rows,columns)
      finish_rows(out_rows, coordinates_of<kDim>(mma), softmax, [&](int row, float max, float sum) {
        if (row < rows) lse[row * heads] = Softmax::lse_of(max, sum);
      });
      lse -= kQueries * heads;
      cute::copy(AutoVectorizingCopy{}, convert<Element>(out), mma.get_slice(lane_index()).partition_C(sO));
      wait_for_copies<0>();
      __syncwarp();  // the results are there, and the next queries have arrived
      results.store(sO, p.out.token_stride, rows);
      rows = kQueries;
    }
  }

  // The first query tile of a warp and their number, one at least.
  struct Share {
    int first, count;
  };
  static_assert(kMinResidentQueries >= kWarps * kQueries);
  static __device__ __forceinline__ Share share_of(int share, int shares, const Problem& problem) {
    const int num_tiles = ceil_div(int(problem.num_queries()), kQueries);
    const int each = num_tiles / shares, rest = num_tiles - each * shares;
    return {share * each + min(share, rest), each + (share < rest)};
  }

  // All rows of groups that exist; those past the keys become zero.
  static __device__ void start_rows(Element* shared, const TokenTensor& t, int batch, int head, int num_keys,
                                    int64_t columns) {
    const bool is_grouped = num_keys <= kGroupedChunks * kChunk;
    const int padded = is_grouped ? ceil_div(num_keys, kGroup * kChunk) * kGroup * kChunk : num_keys;
    int tile = (padded - 1) / kRowsOfCopy;
    Rows rows(t.at<const Element>(batch, tile * kRowsOfCopy, head), t.token_stride, int(columns));
    for (; tile >= 0; --tile) {
      Tensor sT = shared_tile<SharedRows>(shared + tile * int{SharedRows::kElements});  // (rows,dim)
      rows.start_some(sT, num_keys - tile * kRowsOfCopy);
    }
  }

  // (rows,columns) -> (row,column) of a thread's accumulators
  template <int kColumns>
  static __device__ auto coordinates_of(const Mma& mma) {
    return by_rows(
        mma.get_slice(lane_index()).partition_C(make_identity_tensor(Shape<Int<kQueries>, Int<kColumns>>{})));
  }

  // Products of the queries with the keys of some chunks.
  template <int kFirst, int kEnd, class Queries, class Shared>
  static __device__ __forceinline__ void multiply_keys(const Mma& mma, Chunk (&logits)[kChunks], const Queries& rQ,
                                                       const Shared& sK) {
    const typename Mma::CopyB atom;
    const auto copy = make_tiled_copy_B(atom, mma).get_slice(lane_index());
    Tensor rK = make_fragment_like<Element>(mma.get_slice(lane_index()).partition_fragment_B(sK));  // (MMA,MMA_N,MMA_K)
    Tensor tKs = copy.partition_S(sK);                                                              // (CPY,CPY_N,CPY_K)
    Tensor tKr = copy.retile_D(rK);                                                                 // (CPY,CPY_N,CPY_K)
    CUTE_UNROLL
    for (int chunk = kFirst; chunk < kEnd; ++chunk) clear(logits[chunk]);
    // The depth outside, so that neighbouring instructions do not wait for each other.
    CUTE_UNROLL
    for (int k = 0; k < size<2>(rQ); ++k) {
      CUTE_UNROLL
      for (int chunk = kFirst; chunk < kEnd; ++chunk) {
        cute::copy(atom, tKs(_, chunk, k), tKr(_, chunk, k));
        gemm(mma, rQ(_, 0, k), rK(_, 2 * chunk, k), logits[chunk](_, 0, 0));
        gemm(mma, rQ(_, 0, k), rK(_, 2 * chunk + 1, k), logits[chunk](_, 0, 1));
      }
    }
  }

  // Bias and mask of some chunks.
  template <int kFirst, int kEnd, class Bias, class Coordinates>
  static __device__ __forceinline__ void finish_logits(Chunk (&logits)[kChunks], Bias& bias, float scale,
                                                       const Coordinates& coordinates, int num_keys) {
    if (num_keys >= kEnd * kChunk) {
      CUTE_UNROLL
      for (int chunk = kFirst; kHasBias && chunk < kEnd; ++chunk) {
        Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
        bias.template add<true>(numbers, scale);
      }
      return;
    }
    if constexpr (kHasBias) rarely();  // once a tile; with predicates, its loads would be issued for all keys
    CUTE_UNROLL
    for (int chunk = kFirst; chunk < kEnd; ++chunk) {
      const int keys = num_keys - chunk * kChunk;
      Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
      if constexpr (kHasBias) bias.add_some(numbers, scale, keys);
      if (keys < kChunk) mask_tail(numbers, coordinates, keys);
    }
  }

  static __device__ __forceinline__ void subtract(Chunk (&logits)[kChunks], int row, float x) {
    CUTE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Tensor numbers = by_rows(logits[chunk]);  // (rows,columns)
      CUTE_UNROLL
      for (int c = 0; c < size<1>(numbers); ++c) numbers(row, c) -= x;
    }
  }

  // Logits become exponentials; out += their product with the values of a chunk.
  template <class Out, class Shared>
  static __device__ __forceinline__ void multiply_values(const Mma& mma, Out& out, Softmax& softmax, Chunk& logits,
                                                         const Shared& sV, int chunk) {
    const auto sVt = transposed(sV);  // (dim,keys)
    const typename Mma::CopyTransposedB atom;
    const auto copy = make_tiled_copy_B(atom, mma).get_slice(lane_index());
    Tensor rV =
        make_fragment_like<Element>(mma.get_slice(lane_index()).partition_fragment_B(sVt));  // (MMA,MMA_N,MMA_K)
    Tensor tVs = copy.partition_S(sVt);                                                      // (CPY,CPY_N,CPY_K)
    Tensor tVr = copy.retile_D(rV);                                                          // (CPY,CPY_N,CPY_K)
    cute::copy(atom, tVs(_, _, chunk), tVr(_, _, chunk));
    Tensor numbers = by_rows(logits);  // (rows,columns)
    softmax.exponentiate(numbers);
    const auto probs = as_operand_a(convert<Element>(logits));  // (MMA,MMA_M,MMA_K)
    gemm(mma, probs(_, _, 0), rV(_, _, chunk), out);
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
                      Kernel::kThreads, Kernel::kSharedBytes, stream, p, plain_tasks(problem, of_head, 1));
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
